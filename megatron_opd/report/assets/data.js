"use strict";
// What the report holds, as columns over steps.
const Data = (() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const report = read("report");
  const sampled = new Map();

  for (const [i, run] of report.runs.entries()) {
    run.index = i;
    run.curves = unpack(run.curves);
    for (const rollback of run.rollbacks) rollback.curves = unpack(rollback.curves);
  }
  const every = report.runs.flatMap((run) => [run.curves, ...run.rollbacks.map(({ curves }) => curves)]);
  const steps = every.flatMap((curves) => [curves.steps[0], curves.steps.at(-1)]);
  const extent = [Math.min(...steps), Math.max(...steps)];
  if (extent[0] === extent[1]) extent.splice(0, 2, extent[0] - 0.5, extent[1] + 0.5);

  function unpack({ steps, columns, histograms }) {
    for (const [name, column] of Object.entries(columns)) {
      if (Array.isArray(column)) continue;
      const dense = new Array(steps.length).fill(null);
      column.at.forEach((place, i) => (dense[place] = column.values[i]));
      columns[name] = dense;
    }
    return { steps, columns, histograms };
  }

  const has = (run, name) => (name === report.histogram ? run.curves.histograms.length > 0 : name in run.curves.columns);

  // The index of the last step that is not after `step`; -1 before the first.
  function indexAt(curves, step) {
    let low = -1;
    let high = curves.steps.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (curves.steps[middle] <= step) low = middle;
      else high = middle;
    }
    return low;
  }

  // {value, step} of a name at a step: there, or with `back` at the last step before that measured it.
  function at(curves, name, step, back) {
    const column = curves.columns[name];
    if (!column) return null;
    for (let i = indexAt(curves, step); i >= 0; i -= 1) {
      if (column[i] !== null) return { value: column[i], step: curves.steps[i] };
      if (!back) break;
    }
    return null;
  }

  // The mean over `window` steps around each; gaps stay gaps.
  function smooth(column, window) {
    if (window <= 1) return column;
    const half = Math.floor(window / 2);
    const sums = [0];
    const counts = [0];
    column.forEach((value, i) => {
      sums.push(sums[i] + (value ?? 0));
      counts.push(counts[i] + (value === null ? 0 : 1));
    });
    return column.map((value, i) => {
      if (value === null) return null;
      const [from, to] = [Math.max(0, i - half), Math.min(column.length, i + half + 1)];
      return (sums[to] - sums[from]) / (counts[to] - counts[from]);
    });
  }

  // The recorded responses of a step, parsed when first asked for.
  function samples(run, step) {
    const id = `samples-${run.index}-${step}`;
    if (!sampled.has(id)) sampled.set(id, document.getElementById(id) ? read(id) : []);
    return sampled.get(id);
  }

  return { report, runs: report.runs, extent, has, at, indexAt, smooth, samples };
})();
