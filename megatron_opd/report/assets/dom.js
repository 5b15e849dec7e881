"use strict";
// Elements. Whatever comes from a run passes through text nodes, never through markup.
const Dom = (() => {
  // el("p", {class: "note", onclick: f}, "text", child)
  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  }

  function swatch(color, dash = "") {
    const node = el("span", { class: `swatch ${dash}`, "aria-hidden": "true" });
    node.style.color = color;
    return node;
  }

  // A labelled <select>; options are [value, text] pairs.
  function select(label, options, value, onchange) {
    const control = el(
      "select",
      { "aria-label": label, onchange: () => onchange(control.value) },
      options.map(([each, text]) => el("option", { value: each, selected: String(each) === String(value) }, text)),
    );
    return el("label", { class: "control" }, label, control);
  }

  return { el, swatch, select };
})();
