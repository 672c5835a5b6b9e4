(() => {
  "use strict";
  // Everything on the page is readable without this script; it only hides what was filtered out.
  const form = document.getElementById("filter");
  const samples = [...document.querySelectorAll(".sample")].map((element) => ({
    element,
    marks: JSON.parse(element.dataset.marks),
    words: element.textContent.toLowerCase(),
    seen: [...element.querySelectorAll(".seen .mark")],
  }));
  const said = (mark) => (mark === null ? "not graded" : mark ? "correct" : "wrong");
  const wanted = {
    all: () => true,
    right: (before, after) => after === true,
    wrong: (before, after) => after === false,
    changed: (before, after) => before !== null && after !== null && before !== after,
    fixed: (before, after) => before === false && after === true,
    broken: (before, after) => before === true && after === false,
  };
  const apply = () => {
    const value = (name) => (form.elements[name] ? form.elements[name].value : "");
    const words = value("words").trim().toLowerCase();
    let shown = 0;
    for (const sample of samples) {
      const known = Object.prototype.hasOwnProperty.call(sample.marks, value("strategy"));
      const marks = known ? sample.marks[value("strategy")] : [null, null];
      const fits = (value("eval") === "" || sample.element.dataset.eval === value("eval"))
        && wanted[value("show")](marks[0], marks[1]) && (words === "" || sample.words.includes(words));
      sample.element.hidden = !fits;
      shown += fits ? 1 : 0;
      sample.seen.forEach((mark, i) => {
        mark.textContent = said(marks[i]);
        mark.className = "mark " + said(marks[i]).split(" ")[0];
      });
    }
    form.elements.count.value = shown + " of " + samples.length + " shown";
  };
  if (form) {
    form.hidden = false;
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open], .sample)")];
    closed.forEach((element) => { element.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((element) => { element.open = false; }));
})();
