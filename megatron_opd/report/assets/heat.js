"use strict";
// The histogram of response lengths over steps, a colour for each step and bin.
const Heat = (() => {
  const budget = (run) => run.budget ?? binCount(run);
  const binCount = (run) => Math.max(...run.curves.histograms.map((counts) => counts?.length ?? 0));
  const top = (run) => budget(run);
  const FULL = 0.25; // the share of the responses from which a cell has its full colour
  const strength = (share) => Math.sqrt(Math.min(1, share / FULL)); // the root, so that single responses are seen beside a crowd

  // Steps share a column of pixels where there are more steps than pixels: then a cell is the mean over them.
  function draw(u, run) {
    const { ctx, bbox } = u;
    const bins = binCount(run);
    const { steps, histograms } = run.curves;
    const [first, last] = [Data.indexAt(run.curves, Math.ceil(u.scales.x.min)), Data.indexAt(run.curves, u.scales.x.max)];
    if (last < 0) return;
    const width = Math.max(1, Math.round(bbox.width / devicePixelRatio));
    const sums = new Float64Array(width * bins);
    const weights = new Float64Array(width);
    const place = (step) => ((step - u.scales.x.min) / (u.scales.x.max - u.scales.x.min)) * width;
    for (let i = Math.max(0, first); i <= last; i += 1) {
      const counts = histograms[i];
      if (!counts) continue;
      const total = counts.reduce((sum, count) => sum + count, 0);
      // A step's column reaches half way to its neighbours.
      const from = Math.max(0, Math.floor(place(steps[i] - 0.5)));
      const to = Math.min(width, Math.max(from + 1, Math.floor(place(steps[i] + 0.5))));
      for (let x = from; x < to; x += 1) {
        weights[x] += 1;
        for (let bin = 0; bin < counts.length; bin += 1) sums[x * bins + bin] += counts[bin] / total;
      }
    }
    ctx.save();
    ctx.imageSmoothingEnabled = false;
    ctx.drawImage(image(sums, weights, width, bins, Data.runs.length > 1 ? run.index : 0), bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.restore();
  }

  function image(sums, weights, width, bins, hue) {
    const canvas = Dom.el("canvas", { width, height: bins });
    const ctx = canvas.getContext("2d");
    const pixels = ctx.createImageData(width, bins);
    const [red, green, blue] = Theme.hue(hue).match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
    for (let x = 0; x < width; x += 1) {
      if (!weights[x]) continue;
      for (let bin = 0; bin < bins; bin += 1) {
        const at = 4 * ((bins - 1 - bin) * width + x);
        pixels.data.set([red, green, blue, 255 * strength(sums[x * bins + bin] / weights[x])], at);
      }
    }
    ctx.putImageData(pixels, 0, 0);
    return canvas;
  }

  // The bin under the cursor where the mouse is in this plot, else the fullest one.
  function legend(panel, run) {
    const when = Dom.el("span", { class: "when" });
    const text = Dom.el("span");
    const node = Dom.el("p", { class: "legend" }, when, " ", text);
    const bins = binCount(run);
    const size = top(run) / bins;

    function update(step, u) {
      const last = run.curves.histograms.findLastIndex((counts) => counts);
      const i = step === null ? last : Data.indexAt(run.curves, step);
      const counts = i < 0 ? null : run.curves.histograms[i];
      when.textContent = step === null ? "last" : `step ${Format.step(step)}`;
      if (!counts) {
        text.textContent = "–";
        return;
      }
      const here = step !== null && u?.over.matches(":hover");
      const bin = here ? Math.min(bins - 1, Math.max(0, Math.floor(u.posToVal(u.cursor.top, "y") / size))) : counts.indexOf(Math.max(...counts));
      const total = counts.reduce((sum, count) => sum + count, 0);
      const range = `${Format.value(Math.round(bin * size), "tokens")} to ${Format.value(Math.round((bin + 1) * size), "tokens")} tokens`;
      text.textContent = `${range}: ${counts[bin]} of ${Format.plural(total, "response")} (${Format.value(counts[bin] / total, "share")})${here ? "" : ", the fullest bin"}`;
    }
    update(null);
    return { node, update };
  }

  return { draw, legend, top };
})();
