"use strict";
// The page, from top to bottom.
(() => {
  const { el } = Dom;
  const { report, runs } = Data;
  const page = document.getElementById("page");
  const anchor = (title) => title.toLowerCase().replaceAll(/\W+/g, "-");
  const links = [];

  function section(title, ...children) {
    links.push(el("a", { href: `#${anchor(title)}` }, title));
    return el("section", { class: "block", id: anchor(title) }, el("h2", {}, title), ...children);
  }

  function panels({ title, panels: table }) {
    const figures = table.map((panel) => [panel, Charts.figure(panel)]);
    const drawn = figures.flatMap(([, figure]) => figure ?? []);
    const missing = figures.filter(([, figure]) => !figure).map(([panel]) => panel.title);
    if (drawn.length === 0) return null;
    const note = missing.length ? el("p", { class: "note" }, `Not measured in ${runs.length > 1 ? "these runs" : "this run"}: ${missing.join(", ")}.`) : null;
    return section(title, el("div", { class: "panels" }, drawn), note);
  }

  // What metrics.jsonl has beyond the table, drawn when it is opened.
  function others() {
    const known = new Set(report.sections.flatMap(({ panels: table }) => table.flatMap(({ curves }) => curves.map(({ name }) => name))));
    const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves.columns)))].filter((name) => !known.has(name)).sort();
    if (names.length === 0) return null;
    const grid = el("div", { class: "panels" });
    const plain = (name) => ({
      key: anchor(name), title: name, unit: "", look_for: "", kind: "lines", log: false, low: null, high: null,
      curves: [{ name, label: "value", joined: name.startsWith("eval/") }],
      levels: runs.map(() => []),
    });
    const open = () => grid.childElementCount || grid.append(...names.map((name) => Charts.figure(plain(name))));
    return section("Other metrics", el("details", { ontoggle: open }, el("summary", {}, Format.plural(names.length, "name")), grid));
  }

  function toolbar() {
    const reset = el("button", { type: "button", hidden: true, onclick: () => Plots.zoom(Data.extent) }, "all steps");
    Plots.onZoom((zoomed) => (reset.hidden = !zoomed));
    const windows = [[1, "none"], [5, "5 steps"], [21, "21 steps"], [101, "101 steps"], [1001, "1,001 steps"]];
    const lengths = windows.filter(([window]) => window * 4 < Data.extent[1] || window === 1);
    const smoothing = Dom.select("mean over", lengths, 1, (window) => Plots.setSmoothing(Number(window)));
    const chips = runs.length > 1 ? el("span", { class: "chips" }, runs.map(chip)) : null;
    return el("nav", { class: "toolbar" }, el("span", { class: "links" }, links), chips, smoothing, reset);
  }

  function chip(run) {
    const button = el("button", { type: "button", title: "show or hide", onclick: () => button.classList.toggle("off", !Plots.toggleRun(run.index)) });
    button.append(Dom.swatch(`var(--hue-${run.index % 8})`), run.name);
    return button;
  }

  const title = runs.length > 1 ? `${runs.length} runs side by side` : runs[0].name;
  const differences = report.differences.length ? [el("h3", {}, "What differs in their configs"), Tables.byRun(report.differences, "key")] : [];
  const rolledBack = runs.some((run) => run.rollbacks.length > 0) ? " Faint curves were rolled back." : "";
  const blocks = [
    section(
      "Story",
      el(
        "div",
        { class: runs.length > 1 ? "story-of-several" : "story-of-one" },
        el("div", { class: "stories" }, Tables.stories()),
        el("div", {}, Tables.byRun(report.key_figures, ""), el("p", { class: "note" }, "Start and end: means of the first and the last 5 steps.")),
      ),
      ...differences,
    ),
    section("Alarms", Tables.alarms(Rollouts.goTo)),
    ...report.sections.map(panels),
    section("Rollouts", Rollouts.browser()),
    others(),
    section("Config and notes", Tables.notes(), ...Tables.configs()),
  ].filter((block) => block);
  page.append(
    el(
      "header",
      { class: "top" },
      el("h1", {}, title),
      el("p", { class: "note" }, `megatron-opd report, ${report.written}. Drag over a plot to zoom into its steps, double-click for all of them.${rolledBack}`),
    ),
    toolbar(),
    ...blocks,
  );
})();
