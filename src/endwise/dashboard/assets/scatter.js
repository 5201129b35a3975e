// Density against importance on a canvas: a dot a feature. The table beside it says the same in words.
"use strict";

class Scatter {
  static LEFT = 56;
  static BOTTOM = 34;
  static TOP = 10;
  static RIGHT = 12;
  static NEAR = 14;

  // axes: { x, y } of `scatterAxes`; open(feature) is called for a click.
  constructor(run, axes, open) {
    Object.assign(this, { run, axes, open });
    this.canvas = el("canvas", { role: "img", "aria-label": this.words() });
    this.element = el("div.scatter", {}, this.canvas);
    this.marked = null;
    this.chosen = -1;
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => tip.hide());
    this.canvas.addEventListener("click", (event) => {
      const found = this.nearest(event);
      if (found >= 0) open(found);
    });
    new ResizeObserver(() => this.draw()).observe(this.element);
    Scatter.all.add(new WeakRef(this));
  }

  words() {
    const { columns } = this.run;
    const alive = Array.from(columns.firings.keys()).filter((feature) => columns.firings[feature] > 0);
    const range = (values) => {
      const ordered = values.filter((value) => !Number.isNaN(value)).sort((a, b) => a - b);
      if (!ordered.length) return "not measured";
      return `${write.number(ordered[0])} to ${write.number(ordered.at(-1))}, median ${write.number(ordered[ordered.length >> 1])}`;
    };
    const x = range(alive.map((feature) => columns.density[feature]));
    const y = range(alive.map((feature) => columns[this.axes.y.name][feature]));
    return `Scatter of ${write.count(alive.length)} alive features. ${this.axes.x.label}: ${x}. ${this.axes.y.label}: ${y}.`;
  }

  // features: a Set of those that a search found, or null for all.
  mark(features) {
    this.marked = features;
    this.draw();
  }

  choose(feature) {
    this.chosen = feature;
    this.draw();
  }

  draw() {
    const { width, height } = this.element.getBoundingClientRect();
    if (!width || !height) return;
    const scale = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
    }
    this.size = { width, height };
    const pen = this.canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const style = getComputedStyle(this.element);
    this.drawAxes(pen, style);
    this.place();
    this.drawDots(pen, style);
  }

  across(value) {
    return Scatter.LEFT + this.axes.x.share(value) * (this.size.width - Scatter.LEFT - Scatter.RIGHT);
  }

  up(value) {
    return this.size.height - Scatter.BOTTOM - this.axes.y.share(value) * (this.size.height - Scatter.BOTTOM - Scatter.TOP);
  }

  drawAxes(pen, style) {
    const { width, height } = this.size;
    pen.font = `12px ${style.fontFamily}`;
    pen.lineWidth = 1;
    pen.strokeStyle = style.getPropertyValue("--rule");
    pen.fillStyle = style.getPropertyValue("--muted");
    pen.textAlign = "center";
    pen.textBaseline = "top";
    let free = 0;
    for (const { value, text } of this.axes.x.ticks) {
      const x = this.across(value);
      line(pen, x, Scatter.TOP, x, height - Scatter.BOTTOM);
      const half = pen.measureText(text).width / 2;
      const centre = Math.min(x, width - half - 1);
      if (centre - half < free) continue;
      pen.fillText(text, centre, height - Scatter.BOTTOM + 7);
      free = centre + half + 8;
    }
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    let below = Infinity;
    for (const { value, text } of this.axes.y.ticks) {
      const y = this.up(value);
      line(pen, Scatter.LEFT, y, width - Scatter.RIGHT, y);
      if (y > below - 14) continue;
      pen.fillText(text, Scatter.LEFT - 7, y);
      below = y;
    }
  }

  place() {
    const { columns, d_sae } = this.run;
    this.x = new Float32Array(d_sae).fill(NaN);
    this.y = new Float32Array(d_sae).fill(NaN);
    const values = columns[this.axes.y.name];
    for (let feature = 0; feature < d_sae; feature += 1) {
      if (columns.firings[feature] === 0 || Number.isNaN(values[feature])) continue;
      this.x[feature] = this.across(columns.density[feature]);
      this.y[feature] = this.up(values[feature]);
    }
  }

  drawDots(pen, style) {
    const many = this.run.d_sae;
    const size = many > 20000 ? 1.6 : many > 4000 ? 2.2 : 3.2;
    const alpha = many > 20000 ? 0.35 : many > 4000 ? 0.5 : 0.65;
    const dot = (feature, radius) => {
      if (!Number.isNaN(this.x[feature])) pen.fillRect(this.x[feature] - radius / 2, this.y[feature] - radius / 2, radius, radius);
    };
    pen.fillStyle = style.getPropertyValue(this.marked ? "--muted" : "--kind");
    pen.globalAlpha = this.marked ? 0.12 : alpha;
    for (let feature = 0; feature < many; feature += 1) dot(feature, size);
    pen.globalAlpha = 1;
    if (this.marked) {
      pen.fillStyle = style.getPropertyValue("--kind");
      for (const feature of this.marked) dot(feature, size + 1.2);
    }
    if (this.chosen >= 0 && !Number.isNaN(this.x[this.chosen])) {
      pen.strokeStyle = style.getPropertyValue("--ink");
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(this.x[this.chosen], this.y[this.chosen], 6, 0, 7);
      pen.stroke();
    }
  }

  nearest(event) {
    if (!this.x) return -1;
    let [found, least] = [-1, Scatter.NEAR ** 2];
    for (let feature = 0; feature < this.x.length; feature += 1) {
      if (this.marked && !this.marked.has(feature)) continue;
      const distance = (this.x[feature] - event.offsetX) ** 2 + (this.y[feature] - event.offsetY) ** 2;
      if (distance < least) [found, least] = [feature, distance];
    }
    return found;
  }

  hover(event) {
    const feature = this.nearest(event);
    this.canvas.classList.toggle("on-dot", feature >= 0);
    if (feature < 0) return tip.hide();
    tip.at(event.clientX, event.clientY, ...featureTip(this.run, feature));
  }
}

// Canvases know nothing of style sheets: they are drawn again when the colours change.
Scatter.all = new Set();
Scatter.redraw = () => {
  for (const reference of Scatter.all) {
    const scatter = reference.deref();
    if (scatter) scatter.draw();
    else Scatter.all.delete(reference);
  }
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", Scatter.redraw);

function line(pen, x1, y1, x2, y2) {
  pen.beginPath();
  pen.moveTo(Math.round(x1) + 0.5, Math.round(y1) + 0.5);
  pen.lineTo(Math.round(x2) + 0.5, Math.round(y2) + 0.5);
  pen.stroke();
}

function featureTip(run, feature) {
  const { columns } = run;
  const facts = [`density ${write.percent(columns.density[feature])}`];
  if (!Number.isNaN(columns.importance[feature])) facts.push(`importance ${write.number(columns.importance[feature])}`);
  const top = run.top(feature);
  return [
    el("b", {}, `Feature ${feature}`),
    top === null ? "" : el("span", {}, " fires at ", token(top)),
    el("br"),
    facts.join(" · "),
    run.explanation(feature) ? el("p", {}, run.explanation(feature)) : "",
  ];
}

// One pair of axes for all runs that are shown side by side.
function scatterAxes(runs) {
  const measured = runs.every((run) => run.measured);
  const name = measured ? "importance" : "max";
  const [xs, ys] = [[], []];
  for (const run of runs) {
    run.columns.firings.forEach((count, feature) => {
      if (count === 0) return;
      xs.push(run.columns.density[feature]);
      const value = run.columns[name][feature];
      if (!Number.isNaN(value)) ys.push(value);
    });
  }
  const label = measured ? "Importance, nats per token" : "Greatest activation";
  const x = { ...logAxis(xs), name: "density", label: "Density" };
  for (const tick of x.ticks) tick.text = write.percent(tick.value);
  return { x, y: { ...(ys.some((value) => value <= 0) ? bothSidesAxis(ys) : logAxis(ys)), name, label } };
}

function powers(low, high) {
  const found = [];
  for (let power = Math.ceil(low - 1e-9); power <= high + 1e-9; power += 1) found.push(10 ** power);
  return found;
}

function ends(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

function logAxis(values) {
  let [low, high] = ends(values).map(Math.log10);
  if (!Number.isFinite(low)) [low, high] = [-1, 0];
  const margin = 0.04 * (high - low) || 0.5;
  [low, high] = [low - margin, high + margin];
  const round = powers(low, high);
  const ticks = (round.length > 1 ? round : [10 ** low, 10 ** ((low + high) / 2), 10 ** high].map((v) => Number(v.toPrecision(1))))
    .map((value) => ({ value, text: powerText(value) }));
  return { share: (value) => (Math.log10(value) - low) / (high - low), ticks };
}

// Logarithmic on both sides of 0 and linear close to it, since a feature may do harm.
function bothSidesAxis(values) {
  const sizes = Float64Array.from(values, Math.abs).filter((size) => size > 0).sort();
  const [low, high] = ends(values);
  const greatest = sizes.at(-1) || 1;
  const linear = Math.max(sizes[Math.floor(sizes.length / 5)] || greatest / 10, greatest / 1e4);
  const bent = (value) => Math.sign(value) * Math.log10(1 + Math.abs(value) / linear);
  const margin = 0.04 * (bent(high) - bent(low)) || 0.5;
  const [bottom, top] = [bent(low) - margin, bent(high) + margin];
  const decades = powers(Math.log10(linear), Math.log10(greatest));
  const marks = [0, ...decades, ...decades.map((value) => -value)].sort((a, b) => a - b);
  const ticks = marks
    .filter((value) => bent(value) >= bottom && bent(value) <= top)
    .map((value) => ({ value, text: powerText(value) }));
  return { share: (value) => (bent(value) - bottom) / (top - bottom), ticks };
}

function powerText(value) {
  if (value === 0) return "0";
  const power = Math.log10(Math.abs(value));
  if (Math.abs(power - Math.round(power)) > 1e-6) return write.number(value, 2);
  if (power >= -2 && power <= 3) return write.number(value);
  return `${value < 0 ? "−" : ""}10${raised(Math.round(power))}`;
}
