// Curves: one chart for a metric and its held-out twin (`eval/...`), one for the times of all phases.

const PHASES = "time of phases";
const FIRST_CHARTS = [
  "reward", "accuracy", "loss", "divergence", "kl", "sampling/mismatch_kl", "completions/mean_length", PHASES,
  "cross_entropy", "entropy", "grad_norm", "sampling/logprob_difference_mean", "tokens_per_second", "best_loss",
];
const NUM_FIRST = 8;
const LINES = ["line-1", "line-2", "line-3", "line-4", "line-5", "line-6", "line-7"];
const MARKS = { checkpoint: "line-3", best: "line-3", reward: "line-4", restart: "bad" };

function unitOf(title) {
  if (/kl|entropy|divergence|logprob|threshold/.test(title)) return "nats";
  if (title === PHASES || /seconds|time\//.test(title)) return "s";
  if (/_length$|num_tokens$/.test(title)) return "tokens";
  return /ratio(_mean)?$|outside$|masked$/.test(title) ? "share" : "";
}

// Every metric is in exactly one chart: title -> names, the charts that are looked at first before the others.
function catalogue(names) {
  const charts = new Map();
  for (const name of names) {
    const base = name.replace(/^eval\//, "");
    const title = base.startsWith("time/") && base !== "time/step" ? PHASES : base;
    const others = charts.get(title) ?? [];
    // Training comes before what was held out.
    charts.set(title, name === base ? [name, ...others] : [...others, name]);
  }
  charts.get(PHASES)?.reverse();
  const place = (title) => FIRST_CHARTS.indexOf(title) + 1 || FIRST_CHARTS.length + 1;
  return new Map([...charts].sort(([one], [other]) => place(one) - place(other)));
}

function firstCharts(charts) {
  const known = FIRST_CHARTS.filter((title) => charts.has(title));
  return (known.length ? known : [...charts.keys()]).slice(0, NUM_FIRST);
}

// An exponential mean that starts without a bias; gaps stay gaps.
function smoothed(values, weight) {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function labelOf(name, title) {
  if (title === PHASES) return name.replace("time/", "");
  return name.startsWith("eval/") ? "held-out" : "training";
}

function lineOf(title, i, name) {
  if (title === PHASES) return LINES[i % LINES.length];
  return name.startsWith("eval/") ? LINES[1] : LINES[0];
}

class Charts {
  // `choose` is called with the step of a point that is clicked.
  constructor(run, choose) {
    this.run = run;
    this.choose = choose;
    this.charts = new Map();
    this.events = [];
    this.drawing = Promise.resolve();
    byId("smoothing").addEventListener("input", () => this.draw());
    byId("marks").addEventListener("change", () => this.draw());
    byId("picker-search").addEventListener("input", () => this.list());
    byId("pick-default").addEventListener("click", () => this.pick(firstCharts(this.charts)));
    byId("pick-all").addEventListener("click", () => this.pick([...this.charts.keys()]));
    byId("pick-none").addEventListener("click", () => this.pick([]));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && byId("picker").open) this.close();
    });
    document.addEventListener("click", (event) => {
      if (!byId("picker").contains(event.target)) byId("picker").open = false;
    });
  }

  close() {
    byId("picker").open = false;
    byId("picker").querySelector("summary").focus();
  }

  // Take in what a run's state says; draws everything that is shown.
  async update(state) {
    this.events = state.events;
    const before = this.charts.size;
    this.charts = catalogue(state.names);
    this.saved ??= `charts of ${state.algorithm ?? state.name}`;
    this.chosen ??= remembered(this.saved);
    if (this.charts.size !== before) this.list();
    await this.draw();
  }

  get shown() {
    return (this.chosen ?? firstCharts(this.charts)).filter((title) => this.charts.has(title));
  }

  pick(titles) {
    this.chosen = [...this.charts.keys()].filter((title) => titles.includes(title));
    remember(this.saved, this.chosen);
    this.list();
    return this.draw();
  }

  list() {
    const text = byId("picker-search").value.toLowerCase();
    const shown = new Set(this.shown);
    const rows = [...this.charts.entries()]
      .filter(([title, names]) => [title, ...names].some((each) => each.toLowerCase().includes(text)))
      .map(([title]) => {
        const change = (event) => this.pick(
          event.target.checked ? [...this.shown, title] : this.shown.filter((other) => other !== title),
        );
        const box = make("input", { type: "checkbox", value: title, onchange: change });
        box.checked = shown.has(title);
        return make("label", {}, box, ` ${title}`);
      });
    const focused = document.activeElement?.value;
    byId("picker-list").replaceChildren(...rows);
    byId("picker-list").querySelectorAll("input").forEach((box) => box.value === focused && box.focus());
    byId("picked").textContent = `${shown.size} of ${this.charts.size}`;
  }

  // One drawing after the other: each leaves the charts as the latest choice wants them.
  draw() {
    this.drawing = this.drawing.then(() => this.drawAll()).catch((error) => console.error(error));
    return this.drawing;
  }

  async drawAll() {
    const titles = this.shown;
    const values = await this.run.values(titles.flatMap((title) => this.charts.get(title)));
    const byName = new Map(titles.flatMap((title) => this.charts.get(title)).map((n, i) => [n, values[i]]));
    const area = byId("charts");
    const boxes = new Map([...area.children].map((box) => [box.dataset.title, box]));
    for (const [title, box] of boxes) {
      if (!titles.includes(title)) {
        Plotly.purge(box.querySelector(".plot"));
        box.remove();
      }
    }
    for (const title of titles) {
      const box = boxes.get(title) ?? this.box(title);
      area.append(box);
      this.drawOne(box, title, byName);
      // The page answers between two charts.
      await new Promise((done) => setTimeout(done));
    }
    area.dataset.drawn = titles.length;
  }

  box(title) {
    const unit = unitOf(title);
    const heading = make("h3", {}, title, unit ? make("small", {}, ` ${unit}`) : null);
    const box = make("figure", { "data-title": title, class: "chart" }, heading);
    box.append(make("p", { class: "legend" }), make("div", { class: "plot", role: "img" }));
    return box;
  }

  drawOne(box, title, byName) {
    const names = this.charts.get(title);
    const plot = box.querySelector(".plot");
    const traces = names.flatMap((name, i) => this.traces(name, labelOf(name, title), lineOf(title, i, name), byName));
    const known = plot.classList.contains("js-plotly-plot");
    Plotly.react(plot, [...traces, ...this.marks()], this.layout(), { displayModeBar: false, responsive: true });
    if (!known) {
      // Plotly puts its own listeners here.
      plot.on("plotly_click", (event) => this.choose(event.points[0].x));
    }
    const latest = names.map((name, i) => {
      const value = byName.get(name).values.findLast((each) => each !== null) ?? null;
      const key = make("i", { class: lineOf(title, i, name) });
      return make("span", { title: name }, key, `${labelOf(name, title)} `, make("b", {}, show(value)));
    });
    box.querySelector(".legend").replaceChildren(...latest);
    const points = Math.max(...names.map((name) => byName.get(name).steps.length));
    plot.setAttribute("aria-label", `${title}: ${plural(points, "point")}; ${box.querySelector(".legend").textContent}`);
  }

  traces(name, label, line, byName) {
    const { steps, values } = byName.get(name);
    const weight = Number(byId("smoothing").value);
    const few = values.length < 30;
    const trace = {
      x: [...steps],
      y: [...values],
      name: label,
      meta: name,
      mode: few ? "lines+markers" : "lines",
      marker: { size: 4 },
      line: { color: colour(line), width: 1.5, dash: label === "held-out" ? "dot" : "solid" },
      hovertemplate: "%{y:.4~g}",
    };
    if (label === "held-out") trace.mode = "lines+markers";
    if (!weight || values.length < 3) return [trace];
    const raw = { ...trace, opacity: 0.25, hoverinfo: "skip", hovertemplate: null };
    return [raw, { ...trace, y: smoothed(values, weight), mode: "lines", meta: null }];
  }

  // Events as small triangles at the top, with their texts, and a line down from each.
  get marked() {
    return byId("marks").checked ? this.events.filter((event) => event.kind in MARKS) : [];
  }

  marks() {
    const events = this.marked;
    if (!events.length) return [];
    const colours = events.map((event) => colour(MARKS[event.kind]));
    return [{
      x: events.map((event) => event.step),
      y: events.map(() => 1),
      customdata: events.map((event) => escaped(event.text)),
      yaxis: "y2",
      mode: "markers",
      name: "event",
      marker: { symbol: "triangle-down", size: 7, color: colours },
      hovertemplate: "%{customdata}<extra></extra>",
      cliponaxis: false,
    }];
  }

  layout() {
    const grid = { gridcolor: colour("grid"), zeroline: false, linecolor: colour("line"), automargin: true };
    const lines = this.marked.map((event) => ({
      type: "line", opacity: 0.55, x0: event.step, x1: event.step, y0: 0, y1: 1, yref: "paper", layer: "below",
      line: { color: colour(MARKS[event.kind]), width: 1, dash: "dot" },
    }));
    return {
      height: 170,
      margin: { l: 38, r: 8, t: 8, b: 22 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 10, color: colour("quiet") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      showlegend: false,
      hovermode: "x unified",
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("text") } },
      dragmode: "zoom",
      uirevision: "kept",
      xaxis: { ...grid, rangemode: "tozero", nticks: 6 },
      yaxis: { ...grid, nticks: 5, exponentformat: "e" },
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
      shapes: lines,
    };
  }
}

// Plotly takes a few tags in its texts for markup; those of a run are text.
function escaped(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}
