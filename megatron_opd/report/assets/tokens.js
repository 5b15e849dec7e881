"use strict";
// A response as its tokens, coloured by a figure of each; what the models said about a token is shown where the mouse is.
const Tokens = (() => {
  const COLORINGS = {
    advantage: { title: "advantage", of: (sample) => sample.advantage },
    student: { title: "student's log-probability", of: (sample) => sample.student },
    teacher: { title: "teacher's log-probability", of: (sample) => sample.teacher },
    none: { title: "nothing: plain text", of: () => [] },
  };
  const STRONGEST = 0.75; // opacity at the end of the scale: text stays legible on it
  const hint = Dom.el("div", { class: "hint", role: "tooltip", hidden: true });
  const samples = new WeakMap();

  // `scale`: nats at which a colour is strongest.
  function render(sample, coloring, scale) {
    const node = Dom.el("div", { class: "response" });
    if (sample.pieces.length === 0 || coloring === "none") {
      node.append(sample.text ?? sample.pieces.join(""));
      return node;
    }
    const values = COLORINGS[coloring].of(sample);
    const parts = document.createDocumentFragment();
    sample.pieces.forEach((piece, i) => {
      const token = document.createElement("span");
      token.textContent = piece;
      token.dataset.i = i;
      const classes = [piece === "" ? "empty" : /^\s*\n/.test(piece) ? "newline" : "", sample.repeated[i] === "1" ? "repeated" : ""];
      token.className = classes.join(" ").trim();
      const value = values[i];
      if (value !== null && value !== undefined) token.style.backgroundColor = color(value, scale);
      parts.append(token);
    });
    node.append(parts);
    samples.set(node, sample);
    node.addEventListener("mouseover", show);
    node.addEventListener("click", show);
    node.addEventListener("mouseleave", () => (hint.hidden = true));
    return node;
  }

  function color(value, scale) {
    const strength = Math.min(1, Math.abs(value) / scale) * STRONGEST;
    return `rgb(var(--${value < 0 ? "negative" : "positive"}) / ${strength.toFixed(3)})`;
  }

  function show(event) {
    const token = event.target.closest("span[data-i]");
    if (!token) return;
    const sample = samples.get(event.currentTarget);
    const i = Number(token.dataset.i);
    const rows = [
      ["student", sample.student[i]],
      ["teacher", sample.teacher[i]],
      ["advantage", sample.advantage[i]],
    ].filter(([, value]) => value !== undefined);
    hint.replaceChildren(
      Dom.el("code", {}, JSON.stringify(sample.pieces[i])),
      Dom.el("span", { class: "place" }, ` token ${i + 1} of ${sample.pieces.length}${sample.repeated[i] === "1" ? ", repeated" : ""}`),
      Dom.el("table", {}, rows.map(([name, value]) => Dom.el("tr", {}, Dom.el("th", {}, name), Dom.el("td", {}, value === null ? "–" : `${(value || 0).toFixed(4)} nats`)))),
    );
    if (!hint.isConnected) document.body.append(hint);
    hint.hidden = false;
    const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, innerWidth - hint.offsetWidth - 8));
    const below = box.bottom + 6 + hint.offsetHeight < innerHeight;
    hint.style.left = `${left + scrollX}px`;
    hint.style.top = `${(below ? box.bottom + 6 : box.top - hint.offsetHeight - 6) + scrollY}px`;
  }

  function scaleBar(coloring, scale) {
    if (coloring === "none") return null;
    const both = coloring === "advantage";
    const stops = both ? [-1, -0.5, 0, 0.5, 1] : [-1, -0.5, 0];
    const cells = stops.map((share) => {
      const cell = Dom.el("span", {}, `${share > 0 ? "+" : ""}${Number((share * scale).toPrecision(3))}`);
      cell.style.backgroundColor = color(share * scale, scale);
      return cell;
    });
    const [before, after] = both ? ["teacher finds it less likely", "more likely"] : ["unlikely", "certain"];
    return Dom.el("span", { class: "scale" }, before, Dom.el("span", { class: "cells" }, cells), `${after}, nats`);
  }

  return { render, scaleBar, colorings: Object.entries(COLORINGS).map(([key, { title }]) => [key, title]) };
})();
