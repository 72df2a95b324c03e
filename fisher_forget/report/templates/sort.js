
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  const key = row => row.cells[column].textContent.trim();
  const value = row => { const n = parseFloat(key(row).replaceAll(",", "")); return isNaN(n) ? -Infinity : n; };
  const order = (a, b) => value(a) === value(b) ? key(a).localeCompare(key(b)) : value(a) - value(b);
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
});
addEventListener("beforeprint", () => { for (const closed of document.querySelectorAll("details")) closed.open = true; });
