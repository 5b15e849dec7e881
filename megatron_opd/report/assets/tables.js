"use strict";
// The words and tables of a report.
const Tables = (() => {
  const { el, swatch } = Dom;
  const runHead = (run) => el("th", { scope: "col" }, Data.runs.length > 1 ? swatch(`var(--hue-${run.index % 8})`) : null, run.name);

  function stories() {
    return Data.runs.map((run) =>
      el(
        "article",
        { class: "story" },
        Data.runs.length > 1 ? el("h3", {}, swatch(`var(--hue-${run.index % 8})`), run.name) : null,
        el("ul", {}, run.story.map((sentence) => el("li", {}, sentence))),
      ),
    );
  }

  // Rows of [title, cells by run].
  function byRun(rows, title) {
    return el(
      "div",
      { class: "scroll" },
      el(
        "table",
        { class: "figures" },
        el("thead", {}, el("tr", {}, el("th", {}, title), Data.runs.map(runHead))),
        el("tbody", {}, rows.map(([name, cells]) => el("tr", {}, el("th", { scope: "row" }, name), cells.map((cell) => el("td", {}, cell))))),
      ),
    );
  }

  // Alarms of all runs by step; a click shows the rollouts recorded nearest to it.
  function alarms(toRollouts) {
    const all = Data.runs.flatMap((run) => run.alarms.map((alarm) => ({ run, alarm })));
    all.sort((a, b) => a.alarm.step - b.alarm.step);
    if (all.length === 0) return el("p", { class: "note" }, Data.runs.length > 1 ? "No alarm in any run." : "No alarm.");
    const several = Data.runs.length > 1;
    const heads = ["step", several ? "run" : null, "monitor", "level", "value", "limit", "what was seen"].filter((head) => head);
    const rows = all.map(({ run, alarm }) =>
      el(
        "tr",
        {},
        el("td", {}, stepButton(run, alarm, toRollouts)),
        several ? el("td", {}, swatch(`var(--hue-${run.index % 8})`), run.name) : null,
        el("td", {}, alarm.monitor),
        el("td", {}, el("span", { class: `level ${alarm.level === "warn" ? "warn" : "stop"}` }, alarm.level)),
        el("td", {}, Format.value(alarm.value, "") + (alarm.count > 1 ? ` (up to ${Format.value(alarm.peak, "")})` : "")),
        el("td", {}, Format.value(alarm.threshold, "")),
        el("td", { class: "text" }, alarm.message, alarm.count > 1 ? el("span", { class: "place" }, ` (again ${again(alarm)})`) : null, alarm.action && alarm.level !== "warn" ? el("strong", {}, ` → ${alarm.action}`) : null),
      ),
    );
    return el(
      "div",
      { class: "scroll tall" },
      el("table", { class: "alarms" }, el("thead", {}, el("tr", {}, heads.map((head) => el("th", {}, head)))), el("tbody", {}, rows)),
    );
  }

  function again({ count, last_step: last }) {
    return count > 2 ? `${Format.plural(count - 1, "time")} until step ${Format.step(last)}` : `at step ${Format.step(last)}`;
  }

  function stepButton(run, alarm, toRollouts) {
    const text = Format.step(alarm.step);
    if (run.sampled_steps.length === 0) return text;
    return el("button", { type: "button", class: "link", title: "rollouts recorded near it", onclick: () => toRollouts(alarm.step) }, text);
  }

  function configs() {
    return Data.runs
      .filter((run) => run.config)
      .map((run) => el("details", {}, el("summary", {}, `config.yaml of ${run.name}`), el("pre", { class: "config" }, run.config)));
  }

  function notes() {
    const lines = Data.runs.flatMap((run) => run.notes.map((note) => (Data.runs.length > 1 ? `${run.name}: ${note}` : note)));
    return lines.length ? el("ul", { class: "notes" }, lines.map((line) => el("li", {}, line))) : null;
  }

  return { stories, byRun, alarms, configs, notes };
})();
