"use strict";
// Numbers as text.
const Format = (() => {
  const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
  const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });

  function value(number, unit) {
    if (number === null || number === undefined) return "–";
    if (unit === "share") return `${(100 * number).toFixed(1)}%`;
    if (unit === "tokens" || unit === "tokens/s" || unit === "steps") {
      return Number.isInteger(number) || Math.abs(number) >= 1000 ? whole.format(number) : number.toFixed(1);
    }
    const size = Math.abs(number);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return number.toExponential(2);
    return size >= 1e4 ? whole.format(number) : String(Number(number.toPrecision(4)));
  }

  function tick(number, unit) {
    if (number === null) return null;
    if (unit === "share") return `${Number((100 * number).toPrecision(6))}%`;
    const size = Math.abs(number);
    if (size >= 1e4) return compact.format(number);
    return size !== 0 && size < 1e-3 ? Number(number.toPrecision(2)).toExponential() : String(Number(number.toPrecision(6)));
  }

  const step = (number) => whole.format(number);
  const plural = (count, noun) => `${whole.format(count)} ${noun}${count === 1 ? "" : "s"}`;

  return { value, tick, step, plural };
})();
