"use strict";
// Draws the charts of a report from the JSON in the page: hover, zoom, log axes, smoothing. No library, no network.

// Functions of numbers alone.

const UNITS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

// Round numbers from low to high, about `count` of them; on a log axis powers of ten, with 2 and 5 between few.
function ticks(low, high, count, log) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
    const inside = found.filter(value => low <= value && value <= high);
    const decades = inside.filter(value => Number.isInteger(Math.round(Math.log10(value) * 1e9) / 1e9));
    if (decades.length >= 3) return decades.filter((_, i) => i % Math.ceil(decades.length / count) === 0);
    if (inside.length >= 2) return inside;
  }
  const rough = (high - low) / count, size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * size).find(each => each >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

// The labels of the ticks of an axis, each with as many digits as tell it from the next.
function labels(values) {
  const steps = values.slice(1).map((value, i) => value - values[i]);
  const even = Math.max(...steps) < 1.5 * Math.min(...steps), largest = Math.max(...values.map(Math.abs));
  return values.map(value => {
    if (value === 0) return "0";
    const [step, top] = even ? [steps[0], largest] : [Math.abs(value), Math.abs(value)];
    if (top >= 1e15 || top < 1e-3)
      return value.toExponential(Math.max(0, magnitude(value) - magnitude(step))).replace("e+", "e");
    const [size, letter] = (top >= 1e4 && UNITS.find(unit => top >= unit[0])) || [1, ""];
    return (value / size).toFixed(Math.max(0, -magnitude(step / size))) + letter;
  });
}

const magnitude = value => Math.floor(Math.log10(Math.abs(value)) + 1e-9);

// A value to read: five digits, or all those of an integer.
function readable(value) {
  const size = Math.abs(value);
  if (size >= 1e15 || (size < 1e-4 && size > 0)) return value.toExponential(3).replace("e+", "e");
  return size >= 1e4 || Number.isInteger(value) ? Math.round(value).toLocaleString("en-US") : value.toPrecision(5);
}

// An exponential moving average whose start is not drawn towards zero. `weight` is that of the past after 1/1000 of
// the steps, so that a curve of few points is not bent more than one of many.
function smoothed(steps, values, weight) {
  const span = (steps[steps.length - 1] - steps[0]) / 1000 || 1;
  let sum = 0, share = 0;
  return values.map((value, i) => {
    const past = i ? weight ** ((steps[i] - steps[i - 1]) / span) : 0;
    sum = past * sum + (1 - past) * value;
    share = past * share + (1 - past);
    return sum / share;
  });
}

// The index of the element of an ascending list that is nearest to x.
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

// The value at x on the line through ascending points.
function interpolated(xs, ys, x) {
  let right = nearest(xs, x);
  if (xs[right] < x && right < xs.length - 1) right++;
  if (right === 0 || xs[right] <= x) return ys[right];
  const share = (x - xs[right - 1]) / (xs[right] - xs[right - 1]);
  return ys[right - 1] + share * (ys[right] - ys[right - 1]);
}

// [lowest, highest] of the values.
function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

// The extent of all values, or where that would flatten the curve, of the settled ones without outliers: nothing
// beyond half of the span of 98% of them. At most half of the height is lost to what is outside of that.
function robustExtent(values, settled) {
  const all = extent(values);
  if (settled.length < 2) return all;
  const sorted = [...settled].sort((a, b) => a - b), last = sorted.length - 1;
  const low = sorted[Math.ceil(last * 0.01)], high = sorted[Math.floor(last * 0.99)], room = (high - low) / 2;
  const calm = [Math.max(sorted[0], low - room), Math.min(sorted[last], high + room)];
  return room === 0 || all[1] - all[0] <= 2 * (calm[1] - calm[0]) ? all : calm;
}

// The page.

const HEIGHT = 250, TOP = 10, BOTTOM = 40, RIGHT = 14, LETTER = 6.6, MOST_ROWS = 14;
const escaped = text => text.replace(/[&<>"]/g, letter => `&#${letter.charCodeAt(0)};`);

class Chart {
  constructor(figure, data, page) {
    Object.assign(this, { data, page, log: false, zoom: null, id: figure.dataset.chart });
    figure.innerHTML = `<figcaption><b>${escaped(data.title)}</b><span></span><label><input type=checkbox> log</label></figcaption>
      <div class=plot></div><div class=tip hidden></div><p class=legend>${data.lines.map(line =>
        `<span><i style="background:${line.colour}"></i>${escaped(line.label)}</span>`).join("")}</p>`;
    this.plot = figure.querySelector(".plot");
    this.note = figure.querySelector("figcaption span");
    this.tip = figure.querySelector(".tip");
    figure.querySelector("input").onchange = event => { this.log = event.target.checked; this.draw(); };
    this.plot.onpointerdown = event => { this.from = this.across(event); this.plot.setPointerCapture(event.pointerId); };
    this.plot.onpointermove = event => this.hover(event);
    this.plot.onpointerup = event => this.drop(event);
    this.plot.onpointerleave = () => this.mark("");
    this.plot.ondblclick = () => { this.zoom = null; this.draw(); };
  }

  across(event) {
    return event.clientX - this.plot.getBoundingClientRect().left;
  }

  // The lines on the chosen x-axis, without what a log axis cannot show.
  lines() {
    const { axis, logX, weight } = this.page;
    return this.data.lines.map(line => {
      const run = this.page.data.runs[line.run];
      const xs = axis === "steps" ? line.x : line.x.map(step => interpolated(run.steps, run[axis], step));
      const even = smoothed(line.x, line.y, weight);
      const points = xs.map((x, i) => ({ x, y: line.y[i], even: even[i], settled: line.x[i] > run.warmup }));
      return { ...line, points: points.filter(point => !(logX && point.x <= 0) && !(this.log && point.y <= 0)) };
    });
  }

  draw() {
    this.drawn = this.lines();
    const every = this.drawn.flatMap(line => line.points);
    if (!every.length) { this.plot.innerHTML = "<p>No value can be shown on a log axis.</p>"; return; }
    const [left, right] = this.zoom || extent(every.map(point => point.x));
    const shown = every.filter(point => left <= point.x && point.x <= right);
    const values = (shown.length ? shown : every).map(point => point.y);
    const settled = shown.filter(point => point.settled).map(point => point.y);
    const [low, high] = this.zoom || this.log ? extent(values) : robustExtent(values, settled);
    this.x = this.scale(left, right, this.page.logX, 0);
    this.y = this.scale(low, high, this.log, 0.05);
    const yTicks = ticks(this.y.low, this.y.high, 5, this.log), yLabels = labels(yTicks);
    this.width = this.plot.clientWidth || 460;
    this.left = 14 + LETTER * Math.max(...yLabels.map(label => label.length));
    const xTicks = ticks(this.x.low, this.x.high, Math.max(2, Math.floor((this.width - this.left) / 80)), this.page.logX);
    const outside = values.filter(value => value < low || value > high).length;
    this.note.textContent = outside ? `${outside} of ${values.length} points outside: zoom in, or log` : "";
    const end = this.width - RIGHT, bottom = HEIGHT - BOTTOM;
    const parts = yTicks.map((value, i) => `<line x1="${this.left}" x2="${end}" y1="${this.up(value)}" y2="${this.up(value)}"/>
      <text x="${this.left - 6}" y="${this.up(value) + 4}" class=end>${yLabels[i]}</text>`);
    labels(xTicks).forEach((label, i) => {
      const x = Math.min(this.over(xTicks[i]), this.width - LETTER * label.length / 2);
      parts.push(`<text x="${x}" y="${bottom + 16}" class=middle>${label}</text>`);
    });
    parts.push(`<text x="${(this.left + end) / 2}" y="${HEIGHT - 6}" class=middle>${this.page.axis}</text>`);
    const drawn = this.drawn.map(line => this.path(line)).join("");
    this.plot.innerHTML = `<svg width="${this.width}" height="${HEIGHT}"><clipPath id="clip${this.id}"><rect x="${this.left}"
      y="${TOP - 4}" width="${end - this.left}" height="${bottom - TOP + 8}"/></clipPath>${parts.join("")}
      <g clip-path="url(#clip${this.id})">${drawn}</g><g class=over></g></svg>`;
    this.marks = this.plot.querySelector(".over");
  }

  // An axis from low to high: its ends with some room, and the share of the way to a value.
  scale(low, high, log, room) {
    const on = log ? Math.log10 : value => value, back = log ? value => 10 ** value : value => value;
    let [from, to] = [on(low), on(high)];
    const more = from === to ? Math.abs(from) * 0.05 || 1 : room * (to - from);
    [from, to] = [from - more, to + more];
    return { low: back(from), high: back(to), at: value => (on(value) - from) / (to - from), back: share => back(from + share * (to - from)) };
  }

  over(x) { return this.left + this.x.at(x) * (this.width - RIGHT - this.left); }

  up(y) { return HEIGHT - BOTTOM - this.y.at(y) * (HEIGHT - BOTTOM - TOP); }

  path(line) {
    const place = key => line.points.map(point => `${this.over(point.x).toFixed(1)},${this.up(point[key]).toFixed(1)}`).join(" ");
    if (line.points.length === 1) {
      const [point] = line.points;
      return `<circle cx="${this.over(point.x)}" cy="${this.up(point.y)}" r=3 fill="${line.colour}"/>`;
    }
    const raw = `<polyline points="${place("y")}" stroke="${line.colour}" class="${this.page.weight ? "raw" : ""}"/>`;
    return this.page.weight ? raw + `<polyline points="${place("even")}" stroke="${line.colour}"/>` : raw;
  }

  mark(marks, tip) {
    if (this.marks) this.marks.innerHTML = marks;
    this.tip.hidden = !tip;
    this.tip.innerHTML = tip || "";
  }

  hover(event) {
    if (!this.marks) return;
    const at = this.across(event), high = event.clientY - this.plot.getBoundingClientRect().top;
    if (this.from !== undefined && Math.abs(at - this.from) > 4)
      return this.mark(`<rect x="${Math.min(at, this.from)}" y="${TOP}" width="${Math.abs(at - this.from)}" height="${HEIGHT - TOP - BOTTOM}"/>`);
    const x = this.x.back((at - this.left) / (this.width - RIGHT - this.left));
    let found = this.drawn.filter(line => line.points.length).map(line => ({ line, point: line.points[nearest(line.points.map(p => p.x), x)] }))
      .filter(({ point }) => this.x.low <= point.x && point.x <= this.x.high);
    if (!found.length) return this.mark("");
    const distance = ({ point }) => Math.abs(this.over(point.x) - at);
    const header = found.reduce((best, one) => (distance(one) < distance(best) ? one : best)).point.x;
    const far = ({ point }) => Math.abs(this.up(point.y) - high);
    const near = new Set([...found].sort((a, b) => far(a) - far(b)).slice(0, MOST_ROWS));
    found = found.filter(one => near.has(one));
    const rows = found.map(({ line, point }) => `<tr><td><i style="background:${line.colour}"></i>${escaped(line.label)}</td>
      <td>${readable(point.y)}</td><td>${this.page.weight ? `≈ ${readable(point.even)}` : ""}</td>
      <td>${point.x === header ? "" : `at ${readable(point.x)}`}</td></tr>`);
    const each = Math.max(...found.map(({ line }) => line.each));
    const mean = each > 1 ? ` (means of ${each} values)` : "";
    const dots = found.map(({ line, point }) => `<circle cx="${this.over(point.x)}" cy="${this.up(point.y)}" r=3 fill="${line.colour}"/>`);
    this.mark(`<line x1="${this.over(header)}" x2="${this.over(header)}" y1="${TOP}" y2="${HEIGHT - BOTTOM}"/>${dots.join("")}`,
      `<b>${this.page.axis} ${readable(header)}</b>${mean}<table>${rows.join("")}</table>`);
    const beside = at > this.width / 2 ? at - this.tip.offsetWidth - 16 : at + 16;
    this.tip.style.left = `${Math.max(0, beside)}px`;
  }

  drop(event) {
    const [from, to] = [this.from, this.across(event)].sort((a, b) => a - b);
    this.from = undefined;
    if (to - from < 5 || !this.x) return;
    const inside = at => this.x.back(Math.min(1, Math.max(0, (at - this.left) / (this.width - RIGHT - this.left))));
    this.zoom = [inside(from), inside(to)];
    this.draw();
  }
}

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = { data, axis: "steps", logX: false, weight: 0 };
  const charts = [...document.querySelectorAll("figure")].map(figure => new Chart(figure, data.charts[figure.dataset.chart], page));
  const redraw = () => charts.forEach(chart => chart.draw());
  const unzoomed = () => { charts.forEach(chart => { chart.zoom = null; }); redraw(); };
  const [axis, logX, weight] = ["axis", "logx", "weight"].map(id => document.getElementById(id));
  axis.onchange = () => { page.axis = axis.value; unzoomed(); };
  logX.onchange = () => { page.logX = logX.checked; unzoomed(); };
  weight.oninput = () => { page.weight = Number(weight.value); weight.nextElementSibling.textContent = weight.value; redraw(); };
  window.onresize = redraw;
  redraw();
}

if (typeof document !== "undefined") start();
