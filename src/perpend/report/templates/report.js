(() => {
  "use strict";
  const form = document.getElementById("filter");
  if (!form) return;
  form.hidden = false;
  const rows = [...document.querySelectorAll("#pairs > details")];
  const count = document.getElementById("count");
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const show = () => {
    const want = Object.fromEntries(new FormData(form));
    const words = want.words.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, k) => {
      const d = row.dataset;
      const fits = (!want.class || d.class === want.class) && (!want.before || d.before === want.before) &&
        (!want.after || d.after === want.after) && (!want.changed || d.before !== d.after) &&
        (!words || texts[k].includes(words));
      row.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${rows.length} prompts`;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(show));
  const fold = (open) => rows.forEach((row) => { if (!row.hidden) row.open = open; });
  document.getElementById("open").addEventListener("click", () => fold(true));
  document.getElementById("fold").addEventListener("click", () => fold(false));
  show();
})();
