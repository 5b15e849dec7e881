"use strict";
// What is drawn over curves: alarms as vertical lines, levels as horizontal ones.
const Marks = (() => {
  const LABEL_ROOM = 13; // CSS pixels between the labels of two alarms

  // Each alarm where it began, with its name.
  function alarms(u, runs) {
    const { ctx, bbox } = u;
    const ratio = devicePixelRatio;
    const several = Data.runs.length > 1;
    let labelled = -Infinity;
    const all = runs.flatMap((run) => run.alarms.map((alarm) => ({ run, alarm })));
    all.sort((a, b) => a.alarm.step - b.alarm.step);
    ctx.save();
    clip(ctx, bbox);
    ctx.font = `${10.5 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    for (const { run, alarm } of all) {
      const x = Math.round(u.valToPos(alarm.step, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      const color = several ? Theme.hue(run.index) : Theme.level(alarm.level);
      ctx.strokeStyle = ctx.fillStyle = color;
      ctx.lineWidth = ratio;
      ctx.setLineDash(alarm.level === "warn" ? [3 * ratio, 3 * ratio] : []);
      line(ctx, x, bbox.top, x, bbox.top + bbox.height);
      if (x - labelled >= LABEL_ROOM * ratio) {
        labelled = x;
        const text = alarm.level === "warn" ? alarm.monitor : `${alarm.monitor}: ${alarm.level}`;
        ctx.save();
        ctx.translate(x + 9 * ratio, bbox.top);
        ctx.rotate(Math.PI / 2);
        halo(ctx, text, 0, 4 * ratio);
        ctx.restore();
      }
    }
    ctx.restore();
  }

  // Those that are the same in all runs once and in grey, others in their run's colour.
  function levels(u, byRun, runs) {
    const { ctx, bbox } = u;
    const ratio = devicePixelRatio;
    const same = new Map();
    for (const run of runs) for (const each of byRun[run.index]) {
      const key = `${each.label} ${each.value}`;
      same.set(key, [...(same.get(key) ?? []), { ...each, run }]);
    }
    ctx.save();
    clip(ctx, bbox);
    ctx.font = `${10.5 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "right";
    ctx.textBaseline = "alphabetic";
    for (const [{ label, value, run }, ...others] of same.values()) {
      const y = Math.round(u.valToPos(value, "y", true));
      if (y < bbox.top - 1 || y > bbox.top + bbox.height + 1) continue;
      const own = others.length === 0 && runs.length > 1;
      ctx.strokeStyle = ctx.fillStyle = own ? Theme.hue(run.index) : Theme.get("muted");
      ctx.lineWidth = ratio;
      ctx.setLineDash([7 * ratio, 4 * ratio]);
      line(ctx, bbox.left, y, bbox.left + bbox.width, y);
      const above = y - bbox.top > 16 * ratio;
      halo(ctx, label, bbox.left + bbox.width - 4 * ratio, above ? y - 4 * ratio : y + 12 * ratio);
    }
    ctx.restore();
  }

  function clip(ctx, { left, top, width, height }) {
    ctx.beginPath();
    ctx.rect(left, top, width, height);
    ctx.clip();
  }

  function line(ctx, x0, y0, x1, y1) {
    ctx.beginPath();
    ctx.moveTo(x0, y0);
    ctx.lineTo(x1, y1);
    ctx.stroke();
  }

  function halo(ctx, text, x, y) {
    ctx.save();
    ctx.setLineDash([]);
    ctx.strokeStyle = Theme.get("card");
    ctx.lineWidth = 2 * devicePixelRatio;
    ctx.strokeText(text, x, y);
    ctx.restore();
    ctx.fillText(text, x, y);
  }

  return { alarms, levels, clip };
})();
