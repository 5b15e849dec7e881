"use strict";
// From a panel of the table (megatron_opd/report/panels.py) to a figure: its plots and the legend, which shows values at the cursor.
const Charts = (() => {
  const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
  const DASH_NAMES = ["", "dashed", "dotted", "dash-dot"];

  // A figure, or null where no run has any of the panel's curves.
  function figure(panel) {
    const runs = Data.runs.filter((run) => panel.curves.some((curve) => Data.has(run, curve.name)));
    const curves = panel.curves.filter((curve) => runs.some((run) => Data.has(run, curve.name)));
    if (runs.length === 0) return null;
    const together = panel.kind === "lines";
    const groups = together ? [runs] : runs.map((run) => [run]);
    const parts = groups.map((group) => part({ ...panel, curves }, group, !together && Data.runs.length > 1));
    return Dom.el(
      "figure",
      { class: `panel${parts.length > 1 ? " wide" : ""}`, id: `panel-${panel.key}` },
      Dom.el("figcaption", {}, Dom.el("h3", {}, panel.title, panel.unit ? Dom.el("small", {}, panel.unit) : null), Dom.el("p", {}, panel.look_for)),
      Dom.el("div", { class: "parts" }, parts),
    );
  }

  function part(panel, runs, named) {
    const hiddenCurves = new Set();
    const legend = panel.kind === "heat" ? Heat.legend(panel, runs[0]) : values(panel, runs, (i) => toggle(i));
    const host = Plots.plot(() => ({ ...KINDS[panel.kind](panel, runs), ...common(panel, runs), onCursor: legend.update, hiddenCurves }));
    function toggle(i) {
      if (!hiddenCurves.delete(i)) hiddenCurves.add(i);
      Plots.show(host);
      return !hiddenCurves.has(i);
    }
    const name = named ? Dom.el("h4", {}, Dom.swatch(`var(--hue-${runs[0].index % 8})`), runs[0].name) : null;
    return Dom.el("div", { class: "part" }, name, host, legend.node);
  }

  function common(panel, runs) {
    return {
      unit: panel.unit,
      log: panel.log,
      draw: (u) => {
        const shown = runs.filter(Plots.isShown);
        Marks.levels(u, panel.levels, shown);
        Marks.alarms(u, shown);
      },
    };
  }

  const colored = (runs, run, curve) => () => Theme.hue(runs.length > 1 || Data.runs.length > 1 ? run.index : curve);

  // Every run's curves, and what was rolled back as ghosts of the same colour.
  function lines(panel, runs) {
    const tables = [];
    const series = [];
    const meta = [];
    for (const run of runs) {
      for (const [i, curve] of panel.curves.entries()) {
        const versions = [{ curves: run.curves, ghost: false }, ...run.rollbacks.map(({ curves }) => ({ curves, ghost: true }))];
        for (const { curves, ghost } of versions) {
          const column = curves.columns[curve.name];
          if (!column) continue;
          tables.push(curve.joined ? measured(curves.steps, column) : [curves.steps, positive(panel, Data.smooth(column, Plots.smoothing))]);
          const color = colored(runs, run, i);
          series.push({
            stroke: ghost ? () => Theme.fade(color(), 0.35) : color,
            width: ghost ? 1 : 1.5,
            dash: Data.runs.length > 1 ? DASHES[i % DASHES.length] : [],
            points: curve.joined ? { show: apart, size: ghost ? 3 : 5, fill: color } : ghost ? { show: false } : { size: 4, fill: color },
          });
          meta.push({ run: run.index, curve: i, ghost });
        }
      }
    }
    return { data: uPlot.join(tables), series, meta, y: span(panel, runs) };
  }

  // Whether points of these indices have room beside each other.
  function apart(u, i, from, to) {
    const count = u.data[i].slice(from, to + 1).filter((value) => value !== null && value !== undefined).length;
    return count * 8 * devicePixelRatio <= u.bbox.width;
  }

  const measured = (steps, column) => [steps.filter((_, i) => column[i] !== null), column.filter((value) => value !== null)];
  const positive = (panel, column) => (panel.log ? column.map((value) => (value > 0 ? value : null)) : column);

  // Percentiles: two bands around the median; what else the panel has as thin lines.
  function fan(panel, [run]) {
    const { steps, columns } = run.curves;
    const names = panel.curves.map((curve) => curve.name).filter((name) => columns[name]);
    const color = () => Theme.hue(Data.runs.length > 1 ? run.index : 0);
    const [p05, p25, p50, p75, p95] = Data.report.fan.map((name) => names.indexOf(name) + 1);
    const bands = [
      { series: [p95, p05], fill: () => Theme.fade(color(), 0.18) },
      { series: [p75, p25], fill: () => Theme.fade(color(), 0.3) },
    ].filter((band) => band.series.every((i) => i > 0));
    const series = names.map((name, i) => ({
      stroke: i + 1 === p50 ? color : () => Theme.fade(color(), Data.report.fan.includes(name) ? 0.45 : 0.7),
      width: i + 1 === p50 ? 2 : 1,
      dash: Data.report.fan.includes(name) ? [] : [2, 3],
      points: { show: false },
    }));
    const data = [steps, ...names.map((name) => Data.smooth(columns[name], Plots.smoothing))];
    const meta = names.map((name) => ({ run: run.index, curve: panel.curves.findIndex((curve) => curve.name === name) }));
    return { data, series, meta, bands, y: span(panel, Data.runs) };
  }

  // Curves on top of each other.
  function stack(panel, [run]) {
    const { steps, columns } = run.curves;
    const present = panel.curves.map((curve, i) => ({ i, column: columns[curve.name] })).filter(({ column }) => column);
    const sums = new Array(steps.length).fill(0);
    const layers = present.map(({ column }) => {
      Data.smooth(column, Plots.smoothing).forEach((value, i) => (sums[i] += value ?? 0));
      return sums.map((sum, i) => (present.every(({ column: each }) => each[i] === null) ? null : sum));
    });
    const meta = present.map(({ i }) => ({ run: run.index, curve: i })).reverse();
    const series = meta.map(({ curve }) => ({
      stroke: () => Theme.hue(curve),
      width: 1,
      fill: () => Theme.fade(Theme.hue(curve), 0.55),
      points: { show: false },
    }));
    const bands = series.slice(1).map((_, i) => ({ series: [i + 1, i + 2], fill: series[i].fill }));
    return { data: [steps, ...layers.reverse()], series, meta, bands, y: span(panel, []) };
  }

  function heat(panel, [run]) {
    const series = [{ show: true, paths: () => null, points: { show: false } }];
    const data = [run.curves.steps, run.curves.steps.map(() => null)];
    const top = Heat.top(run);
    return { data, series, meta: [{ run: run.index, curve: 0 }], y: () => [0, top], underlay: (u) => Heat.draw(u, run) };
  }

  const KINDS = { lines, fan, stack, heat };

  // The range of the y axis: the data's and the levels', within the panel's bounds.
  function span(panel, runs) {
    const levels = runs.flatMap((run) => panel.levels[run.index] ?? []).map(({ value }) => value);
    return (u, min, max) => {
      const from = [min, max, ...levels].filter((each) => each !== null && Number.isFinite(each));
      if (from.length === 0) return [panel.low ?? 0, panel.high ?? 1];
      if (panel.low === 0 && Math.max(...from) === 0) return [0, panel.high ?? 1];
      let [low, high] = uPlot.rangeNum(Math.min(...from, ...(panel.low === 0 ? [0] : [])), Math.max(...from), 0.08, true);
      low = panel.low ?? low;
      high = panel.high ?? (panel.unit === "share" ? Math.min(high, Math.max(1, ...from)) : high);
      return high > low ? [low, high] : [low, low + 1];
    };
  }

  // Values at the cursor, or the last ones: of one run side by side, of several as a table of runs by curves.
  function values(panel, runs, toggle) {
    const when = Dom.el("span", { class: "when" }, "last");
    const names = panel.curves.map((curve, i) => name(panel, curve, i, toggle));
    const cell = runs.length > 1 ? "td" : "span";
    const cells = runs.map((run) => panel.curves.map(() => Dom.el(cell, { class: "value", "data-run": run.index })));
    const node = runs.length > 1 ? table(runs, when, names, cells) : Dom.el("div", { class: "legend" }, when, names.map((each, i) => Dom.el("span", {}, each, cells[0][i])));

    function update(step) {
      when.textContent = step === null ? "last" : `step ${Format.step(step)}`;
      runs.forEach((run, r) => {
        panel.curves.forEach((curve, i) => {
          const beyond = step !== null && step > run.curves.steps.at(-1);
          const found = beyond ? null : Data.at(run.curves, curve.name, step ?? Infinity, step === null || curve.joined);
          const other = found && step !== null && found.step !== step ? ` (${Format.step(found.step)})` : "";
          cells[r][i].textContent = found ? Format.value(found.value, panel.unit) + other : "–";
        });
      });
    }
    update(null);
    return { node, update };
  }

  // A click hides the curve, or shows it again.
  function name(panel, curve, i, toggle) {
    if (panel.kind === "fan") return curve.label;
    if (panel.kind === "stack") return Dom.el("span", {}, Dom.swatch(`var(--hue-${i % 8})`), curve.label);
    const mark = Data.runs.length > 1 ? Dom.swatch("var(--muted)", DASH_NAMES[i % 4]) : Dom.swatch(`var(--hue-${i % 8})`);
    const button = Dom.el("button", { type: "button", title: "show or hide", onclick: () => button.classList.toggle("off", !toggle(i)) }, mark, curve.label);
    return button;
  }

  function table(runs, when, names, cells) {
    const head = Dom.el("tr", {}, Dom.el("th", {}, when), names.map((each) => Dom.el("th", {}, each)));
    const rows = runs.map((run, r) => Dom.el("tr", {}, Dom.el("th", { class: "run" }, Dom.swatch(`var(--hue-${run.index % 8})`), run.name), cells[r]));
    return Dom.el("table", { class: "legend" }, Dom.el("thead", {}, head), Dom.el("tbody", {}, rows));
  }

  return { figure };
})();
