"use strict";
// Plots that share their cursor, their range of steps, which runs are shown, and the smoothing.
const Plots = (() => {
  const HEIGHT = 210;
  const all = new Set();
  const hiddenRuns = new Set();
  const listeners = [];
  let range = Data.extent;
  let smoothing = 1;
  let moving = false;

  // Calls `build` when `host` comes near the window: a page of 30 panels and 10,000 steps opens at once.
  const near = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        near.unobserve(target);
        target.build();
      }
    },
    { rootMargin: "600px" },
  );
  const sizes = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const width = Math.round(contentRect.width);
      if (target.plot && width && width !== target.plot.width) target.plot.setSize({ width, height: HEIGHT });
    }
  });

  // spec(): {data, series, meta, bands, y, unit, log, draw, underlay, onCursor}; meta[i] = {run, curve, ghost} of series i.
  function plot(spec) {
    const host = Dom.el("div", { class: "plot" });
    host.build = () => {
      host.plot?.destroy();
      host.spec = spec();
      host.plot = new uPlot(options(host, host.spec), host.spec.data, host);
      host.plot.setScale("x", { min: range[0], max: range[1] });
      all.add(host);
      sizes.observe(host);
      show(host);
    };
    near.observe(host);
    return host;
  }

  function options(host, { series, bands, y, unit, log, draw, underlay, onCursor }) {
    const axis = { stroke: () => Theme.get("muted"), font: "11px system-ui, sans-serif" };
    const grid = { stroke: () => Theme.get("grid"), width: 1 };
    const decades = (u, ticks) => ticks.map((each) => (Number.isInteger(Math.round(1e6 * Math.log10(each)) / 1e6) ? each : null));
    return {
      width: Math.round(host.clientWidth),
      height: HEIGHT,
      padding: [8, 10, 0, 0],
      legend: { show: false },
      series: [{}, ...series],
      bands,
      scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: log ? undefined : y } },
      axes: [
        { ...axis, grid: { show: false }, ticks: { ...grid, size: 4 }, size: 26, gap: 4, values: (u, ticks) => ticks.map(Format.step), incrs: STEPS, space: 60 },
        { ...axis, grid: log ? { ...grid, filter: decades } : grid, ticks: { show: false }, size: 50, gap: 6, values: (u, ticks) => ticks.map((each) => Format.tick(each, unit)), space: 28 },
      ],
      cursor: {
        y: false,
        sync: { key: "steps", setSeries: false, filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
        drag: { x: true, y: false, setScale: true, dist: 4 },
        bind: { dblclick: () => () => zoom(Data.extent) },
        points: { size: 5 },
      },
      hooks: {
        setScale: [(u, key) => key === "x" && !moving && u.status && zoom([u.scales.x.min, u.scales.x.max])],
        setCursor: [(u) => onCursor(u.cursor.idx === null || u.cursor.left < 0 ? null : u.data[0][u.cursor.idx], u)],
        drawClear: underlay ? [underlay] : [],
        draw: [draw],
      },
    };
  }

  const STEPS = [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5, 6, 7].map((e) => n * 10 ** e)).sort((a, b) => a - b);

  function zoom([min, max]) {
    if (moving || (min === range[0] && max === range[1])) return;
    range = [min, max];
    moving = true;
    for (const { plot } of all) plot.batch(() => plot.setScale("x", { min, max }));
    queueMicrotask(() => (moving = false));
    for (const listener of listeners) listener(zoomed());
  }

  const zoomed = () => range[0] !== Data.extent[0] || range[1] !== Data.extent[1];

  function show(host) {
    const { meta, hiddenCurves } = host.spec;
    meta.forEach(({ run, curve }, i) => {
      const visible = !hiddenRuns.has(run) && !hiddenCurves?.has(curve);
      if (host.plot.series[i + 1].show !== visible) host.plot.setSeries(i + 1, { show: visible });
    });
  }

  function toggleRun(run) {
    if (!hiddenRuns.delete(run)) hiddenRuns.add(run);
    for (const host of all) {
      show(host);
      host.plot.redraw(false);
    }
    return !hiddenRuns.has(run);
  }

  function setSmoothing(window) {
    smoothing = window;
    for (const host of all) near.observe(host); // built again, far ones when they come near
  }

  Theme.onChange(() => {
    for (const { plot } of all) plot.redraw(false);
  });

  return {
    plot,
    zoom,
    show,
    toggleRun,
    setSmoothing,
    isShown: (run) => !hiddenRuns.has(run.index),
    onZoom: (listener) => listeners.push(listener),
    get smoothing() {
      return smoothing;
    },
  };
})();
