"use strict";
// The browser of recorded rollouts: prompts page by page, the responses of each run to a prompt beside each other.
const Rollouts = (() => {
  const { el, select } = Dom;
  const PROMPTS = 2; // on a page
  const SCALES = [0.5, 1, 2, 5, 10];
  const runs = Data.runs.filter((run) => run.sampled_steps.length > 0);
  const steps = [...new Set(runs.flatMap((run) => run.sampled_steps))].sort((a, b) => a - b);
  const state = { step: steps.at(-1), source: "", verdict: "", finish: "", text: "", coloring: "advantage", scale: 2, page: 0 };
  const bar = el("div", { class: "controls" });
  const list = el("div", { class: "prompts" });
  const root = el("div", { class: "rollouts" }, bar, list);

  function browser() {
    if (steps.length === 0) return el("p", { class: "note" }, "No rollouts were recorded, or --samples 0 left them out.");
    draw();
    return root;
  }

  function set(change) {
    Object.assign(state, { page: 0 }, change);
    draw();
  }

  // The recorded step nearest to `step`.
  function goTo(step) {
    if (steps.length === 0) return;
    set({ step: steps.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best)) });
    root.scrollIntoView({ behavior: "smooth", block: "start" });
  }

  function draw() {
    const prompts = matching();
    const pages = Math.max(1, Math.ceil(prompts.length / PROMPTS));
    state.page = Math.min(state.page, pages - 1);
    const from = state.page * PROMPTS;
    bar.replaceChildren(...controls(), pager(prompts.length, pages, from));
    list.replaceChildren(
      ...prompts.slice(from, from + PROMPTS).map(promptCard),
      prompts.length === 0 ? el("p", { class: "note" }, "No response of this step passes the filters.") : "",
    );
  }

  // [{uid, prompt, answer, byRun: Map(run, samples)}] of the step, without responses that a filter excludes.
  function matching() {
    const prompts = new Map();
    for (const run of runs) {
      for (const sample of Data.samples(run, state.step)) {
        if (!passes(sample)) continue;
        const key = JSON.stringify([sample.uid, sample.prompt]);
        if (!prompts.has(key)) prompts.set(key, { ...sample, byRun: new Map() });
        const { byRun } = prompts.get(key);
        byRun.set(run, [...(byRun.get(run) ?? []), sample]);
      }
    }
    return [...prompts.values()];
  }

  function passes(sample) {
    const { source, verdict, finish, text } = state;
    if (source && sample.source !== source) return false;
    if (verdict && String(sample.correct) !== verdict) return false;
    if (finish && sample.finish !== finish) return false;
    return !text || whole(sample).toLowerCase().includes(text.toLowerCase());
  }

  const whole = (sample) => sample.text ?? sample.pieces.join("");

  function controls() {
    const i = steps.indexOf(state.step);
    const search = el("input", { type: "search", value: state.text, placeholder: "text", onchange: () => set({ text: search.value }) });
    return [
      el(
        "span",
        { class: "control" },
        button("‹", "earlier step", i > 0, () => set({ step: steps[i - 1] })),
        select("step", steps.map((step) => [step, Format.step(step)]), state.step, (step) => set({ step: Number(step) })),
        button("›", "later step", i < steps.length - 1, () => set({ step: steps[i + 1] })),
      ),
      select("written by", [["", "all"], ["student", "student"], ["teacher", "teacher"], ["gold", "gold"]], state.source, (source) => set({ source })),
      select("answer", [["", "all"], ["true", "right"], ["false", "wrong"], ["null", "not checked"]], state.verdict, (verdict) => set({ verdict })),
      select("ended by", [["", "all"], ["stop", "end token"], ["length", "truncation"]], state.finish, (finish) => set({ finish })),
      el("label", { class: "control" }, "contains", search),
      select("colour", Tokens.colorings, state.coloring, (coloring) => set({ coloring, page: state.page })),
      select("full at", SCALES.map((scale) => [scale, `${scale} nats`]), state.scale, (scale) => set({ scale: Number(scale), page: state.page })),
      Tokens.scaleBar(state.coloring, state.scale),
      el("span", { class: "scale" }, el("span", { class: "repeated" }, "underlined"), ": repeated"),
    ].filter((control) => control);
  }

  function pager(count, pages, from) {
    const text = count ? `prompts ${from + 1}–${Math.min(count, from + PROMPTS)} of ${count}` : "no prompts";
    return el(
      "span",
      { class: "control pager" },
      button("‹ previous", "", state.page > 0, () => set({ page: state.page - 1 })),
      el("span", { class: "place", "aria-live": "polite" }, text),
      button("next ›", "", state.page < pages - 1, () => set({ page: state.page + 1 })),
    );
  }

  function button(text, title, enabled, onclick) {
    return el("button", { type: "button", title, disabled: !enabled, onclick }, text);
  }

  function promptCard({ uid, prompt, answer, byRun }) {
    const columns = runs.map((run) => {
      const samples = byRun.get(run) ?? [];
      const name = Data.runs.length > 1 ? el("h4", {}, Dom.swatch(`var(--hue-${run.index % 8})`), run.name) : null;
      const missing = run.sampled_steps.includes(state.step) ? "none passes the filters" : "not recorded at this step";
      return el("div", { class: "column" }, name, samples.length ? samples.map(response) : el("p", { class: "note" }, missing));
    });
    const head = el("header", {}, el("span", { class: "place" }, `prompt ${uid}`), answer === null ? null : el("span", { class: "place" }, `answer ${answer}`));
    return el("section", { class: "prompt" }, head, el("pre", {}, prompt), el("div", { class: "columns" }, columns));
  }

  function response(sample) {
    const verdict = sample.correct === null ? null : el("span", { class: sample.correct ? "right" : "wrong" }, sample.correct ? "✓ right" : "✗ wrong");
    const truncated = sample.finish === "length" ? el("span", { class: "wrong" }, "truncated") : null;
    const length = sample.pieces.length ? Format.plural(sample.pieces.length, "token") : null;
    const mean = average(sample.advantage);
    const repeated = [...sample.repeated].filter((each) => each === "1").length;
    const facts = [
      length,
      mean === null ? null : `mean advantage ${Format.value(mean, "")}`,
      repeated ? `${Format.value(repeated / sample.pieces.length, "share")} repeated` : null,
    ].filter((fact) => fact);
    const head = el("header", {}, el("b", {}, sample.source), verdict, truncated, el("span", { class: "place" }, facts.join(" · ")));
    return el("article", { class: "sample" }, head, Tokens.render(sample, state.coloring, state.scale));
  }

  function average(values) {
    const known = values.filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  }

  return { browser, goTo };
})();
