"use strict";
// Colours of the canvases: custom properties of style.css, which know light and dark.
const Theme = (() => {
  const HUES = 8;
  const listeners = [];
  let known = {};

  function get(name) {
    known[name] ??= getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
    return known[name];
  }

  const hue = (i) => get(`hue-${i % HUES}`);
  const fade = (color, alpha) => color + Math.round(255 * alpha).toString(16).padStart(2, "0"); // of #rrggbb
  const level = (name) => get(name === "warn" ? "warn" : "stop");

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    known = {};
    for (const listener of listeners) listener();
  });

  return { get, hue, fade, level, onChange: (listener) => listeners.push(listener) };
})();
