"""`python -m fisher_forget` is `fisher-forget`."""

from fisher_forget.cli import main

if __name__ == "__main__":
    main()
