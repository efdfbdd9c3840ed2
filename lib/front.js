// The scoreboard's table: filter by words, work and verdict; sort by a header. Without it the whole table stands there.
document.querySelectorAll(".board:not(.live)").forEach(board => {
  const table = board.querySelector("table"), rows = [...table.tBodies[0].rows];
  const words = board.querySelector("input"), choices = [...board.querySelectorAll("select")];
  const told = board.querySelector("output"), heads = [...table.tHead.rows[0].cells];
  const text = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));
  board.classList.add("live");

  const filter = () => {
    const asked = words.value.toLowerCase().split(/\s+/);
    rows.forEach(row => row.hidden = !asked.every(word => text.get(row).includes(word)) ||
      !choices.every(choice => !choice.value || row.dataset[choice.name] === choice.value));
    told.value = `${rows.filter(row => !row.hidden).length} of ${rows.length} numbers`;
  };

  const key = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
  const sorted = (column, sign) => sign === 0 ? rows : [...rows].sort((one, other) => {
    const a = key(one, column), b = key(other, column);
    if (a === "" || b === "") return (a === "") - (b === "");          // what was not run comes last either way
    const numbers = heads[column].dataset.kind === "number";
    return sign * (numbers ? a - b : a.localeCompare(b, "en", {numeric: true}));
  });

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {                           // up, down, as it was
      const sign = {ascending: -1, descending: 0}[head.getAttribute("aria-sort")] ?? 1;
      heads.forEach(each => each.removeAttribute("aria-sort"));
      if (sign) head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      table.tBodies[0].append(...sorted(column, sign));
    });
  });

  [words, ...choices].forEach(each => each.addEventListener("input", filter));
  filter();
});
