"""`python -m fisher_forget` is `fisher-forget`."""

import sys

from fisher_forget.cli import main

if __name__ == "__main__":
    sys.exit(main())
