"use strict";
const each = (selector, act, root = document) => root.querySelectorAll(selector).forEach(act);

// Tables: a button in each head sorts by data-sort (numbers) or text; rows without a figure stay last.
each("table.sortable", table => {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending" && (column > 0 || head.hasAttribute("aria-sort"));
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => {
      const text = row.cells[column].dataset.sort;
      return text === undefined ? null : text !== "" && !isNaN(text) ? Number(text) : text;
    };
    const body = table.tBodies[table.tBodies.length - 1];
    [...body.rows].sort((one, two) => {
      const a = key(one), b = key(two);
      if (a === null || b === null) return (a === null) - (b === null);
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en");
      return down ? -order : order;
    }).forEach(row => body.append(row));
  }));
});

// Fields that show only what matches: rows of a table by text, clips by language and kind.
each("input[data-rows]", field => field.addEventListener("input", () => {
  const wanted = field.value.trim().toLowerCase();
  each(`#${field.dataset.rows} tbody:last-of-type tr`, row => {
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
}));
each("[data-clips]", group => {
  const fields = [...group.querySelectorAll("select")];
  const count = group.querySelector("output");
  const show = () => {
    let shown = 0;
    each(`#${group.dataset.clips} .clip`, clip => {
      clip.hidden = fields.some(field => field.value && clip.dataset[field.name] !== field.value);
      shown += !clip.hidden;
    });
    count.textContent = `${shown} shown`;
  };
  fields.forEach(field => field.addEventListener("change", show));
});

// One sound at a time.
document.addEventListener("play", event => each("audio", player => {
  if (player !== event.target) player.pause();
}), true);
