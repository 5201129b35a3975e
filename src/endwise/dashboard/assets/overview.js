// The overview: runs side by side, each with its scatter, and the table of all features.
"use strict";

const overview = {
  // What the reader has set; it outlives the view, so that going back finds the table as it was.
  state: { which: null, words: "", scope: "all", alive: "alive", sort: null, descending: true, tokens: null, reasons: 7, row: -1 },
  rows: new Uint32Array(0),

  async view(runs, place) {
    const state = this.state;
    await Promise.all(runs.map((run) => run.overview()));
    if (place !== null) state.which = place;
    if (state.which === null) state.which = runs.length > 1 ? "all" : 0;
    this.runs = runs;
    this.axes = scatterAxes(runs);
    this.collect();
    const table = (this.table = new VirtualTable(this.columns(), {
      label: "Features",
      open: (row) => this.open(row),
      moved: (row) => this.choose(row),
      sorted: (column) => this.sortBy(column),
    }));
    this.scatters = runs.map((run) => new Scatter(run, this.axes, (feature) => (location.hash = run.link(feature))));
    this.count = el("p.count", { "aria-live": "polite" });
    this.chips = el("div.chips", { hidden: true });
    const element = el(
      `div.overview${runs.length === 1 ? ".one" : ""}`,
      {},
      this.heading(),
      el("div.cards", {}, runs.map((run, index) => this.card(run, this.scatters[index]))),
      el("section.features", { "aria-label": "All features" }, this.toolbar(), this.chips, table.element),
    );
    return { element, ready: () => this.search(), title: "Features" };
  },

  collect() {
    const { which } = this.state;
    const chosen = which === "all" ? this.runs : [this.runs[which]];
    this.collection = new Collection(chosen);
    if (!this.state.sort) this.state.sort = chosen.every((run) => run.measured) ? "importance" : "density";
  },

  heading() {
    const models = [...new Set(this.runs.map((run) => `${run.model} · ${run.site}`))];
    if (this.runs.length === 1) models.push(this.runs[0].kindName);
    const title = this.runs.length > 1 ? `${this.runs.length} dictionaries, side by side` : this.runs[0].name;
    return el("header.title", {}, el("p.eyebrow", {}, models.join(this.runs.length > 1 ? ", " : " · ")), el("h1", {}, title));
  },

  card(run, scatter) {
    const dead = run.d_sae - run.alive;
    const fact = (label, value, note) => el("div", {}, el("dt", {}, label), el("dd", {}, value, note ? el("small", {}, note) : ""));
    const facts = el(
      "dl.facts",
      {},
      fact("alive", write.count(run.alive), `of ${write.count(run.d_sae)}`),
      fact("dead", write.count(dead), `${write.number((100 * dead) / run.d_sae, 2)} %`),
      fact("L0", write.number(run.l0), "per token"),
      run.ce_increase === null ? "" : fact("CE increase", write.signed(run.ce_increase), "nats"),
      fact(run.knob || "λ", write.number(run.knob_value ?? run.coefficient), run.seed == null ? "" : `seed ${run.seed}`),
    );
    const name = el("h2", {}, run.swatch(), el("span.name", {}, run.name), el("span.kind", {}, run.kindName));
    const { x, y } = this.axes;
    const remarks = (run.remarks || []).map((remark) => el("p.remark", { role: "note" }, `! ${remark}`));
    const note = run.measured ? "" : " Importance was not measured: endwise importance, then endwise harvest --again.";
    const caption = el("figcaption", {}, el("span", {}, `↑ ${y.label}`), el("span", {}, `${x.label} →`), note ? el("p", {}, note) : "");
    return el("article.card", { "data-kind": run.kind }, el("div.about", {}, name, facts, remarks), el("figure", {}, scatter.element, caption));
  },

  toolbar() {
    const { state } = this;
    const input = el("input", {
      type: "search", id: "search", value: state.words, placeholder: "Search features", autocomplete: "off", spellcheck: "false",
      oninput: () => { state.words = input.value; this.search(); },
      onkeydown: (event) => this.searchKey(event),
    });
    this.input = input;
    const scope = this.select("Search in", { all: "words and explanations", token: "a token" }, state.scope, (value) => {
      state.scope = value;
      this.search();
    });
    const alive = this.select("Show", { alive: "alive features", dead: "dead features", all: "all features" }, state.alive, (value) => {
      state.alive = value;
      this.search();
    });
    const which = this.runs.length < 2 ? null : this.select(
      "Of",
      { all: "all runs", ...Object.fromEntries(this.runs.map((run, place) => [place, run.name])) },
      String(state.which),
      (value) => {
        state.which = value === "all" ? "all" : Number(value);
        state.row = -1;
        this.collect();
        this.search();
      },
    );
    const order = this.select(
      "Order", Object.fromEntries(this.columns().map((column) => [column.name, column.label])), state.sort,
      (name) => this.sortBy(this.columns().find((column) => column.name === name)),
    );
    this.order = order.querySelector("select");
    order.classList.add("order");
    const label = el("label.unseen", { for: "search" }, "Search features");
    return el("div.toolbar", {}, el("div.search", {}, label, input, el("kbd", { "aria-hidden": "true" }, "/")), scope, which, alive, order, this.count);
  },

  select(label, options, value, changed) {
    const made = el("select", { "aria-label": label, onchange: () => changed(made.value) }, Object.entries(options).map(([key, text]) => el("option", { value: key }, text)));
    made.value = value;
    return el("label.select", {}, el("span", {}, label), made);
  },

  columns() {
    const { runs } = this;
    const number = (name, form) => (cell, row) => {
      const { run, feature } = this.collection.at(row);
      const value = this.collection.keys(name)[row];
      cell.replaceChildren(form(value, run, feature));
    };
    const text = (found) => (cell, row) => {
      const { run, feature } = this.collection.at(row);
      const shown = found(run, feature);
      cell.replaceChildren(shown === null ? el("span.none", {}, "–") : token(shown));
    };
    const explained = runs.some((run) => run.explained);
    return [
      { name: "feature", label: "Feature", title: "Sort by number", fill: (cell, row) => this.fillFeature(cell, row) },
      { name: "top", label: "Fires at", title: "The token at which its greatest activations add up to most", fill: text((run, f) => run.top(f)) },
      explained
        ? { name: "explanation", label: "Explanation", title: "Sort by explanation", fill: (cell, row) => this.fillExplanation(cell, row) }
        : null,
      { name: "boosted", label: "Raises", title: "The token whose logit its direction raises most", fill: text((run, f) => run.boosted(f)) },
      { name: "density", label: "Density", title: "Share of tokens at which it fires", down: true, fill: number("density", (v) => write.percent(v, true)) },
      { name: "importance", label: "Importance", title: "By how much CE would rise without it, to second order, nats per token", down: true, fill: number("importance", (v) => write.number(v, 3, true)) },
      { name: "max", label: "Max", title: "Its greatest activation", down: true, fill: number("max", (v) => write.number(v, 3, true)) },
    ].filter(Boolean);
  },

  fillFeature(cell, row) {
    const { run, feature } = this.collection.at(row);
    const name = this.runs.length > 1 ? el("span.of", { title: run.name }, run.name) : "";
    const link = el("a", { href: run.link(feature), tabindex: -1 }, String(feature));
    cell.replaceChildren(run.swatch(), link, name, run.isAlive(feature) ? "" : el("span.dead", {}, "dead"));
  },

  fillExplanation(cell, row) {
    const { run, feature } = this.collection.at(row);
    const words = run.explanation(feature);
    const score = run.columns.detection ? run.columns.detection[feature] : NaN;
    const shown = Number.isNaN(score) ? "" : el("span.score", { title: "Detection score" }, score.toFixed(2));
    cell.replaceChildren(words ? el("span.words", { title: words }, words) : el("span.none", {}, "–"), shown);
  },

  sortBy(column) {
    const { state } = this;
    if (state.sort === column.name) state.descending = !state.descending;
    else Object.assign(state, { sort: column.name, descending: Boolean(column.down) });
    this.order.value = state.sort;
    this.sort();
  },

  sort() {
    const { state, table } = this;
    const start = performance.now();
    this.rows = sortRows(this.found, this.collection.keys(state.sort), state.descending);
    table.markSorted(state.sort, state.descending);
    table.show(this.rows, state.row);
    performance.measure("endwise-sort", { start, end: performance.now() });
  },

  async search() {
    try {
      await this.find();
    } catch (error) {
      this.count.textContent = error.message;
    }
  },

  // The rows that answer what is typed, in the order of the table.
  async find() {
    const { state, collection } = this;
    const asked = (this.asked = (this.asked || 0) + 1);
    const words = state.words.trim().toLowerCase();
    let wanted = null;
    this.chips.hidden = !(state.scope === "token" && words);
    if (words && state.scope === "token") wanted = await this.rowsOfTokens(state.words, asked);
    else if (words) wanted = this.rowsWith(words);
    if (asked !== this.asked) return;
    const firings = collection.keys("firings");
    const rows = wanted || Uint32Array.from({ length: collection.size }, (_, row) => row);
    const fits = { alive: (row) => firings[row] > 0, dead: (row) => firings[row] === 0, all: () => true }[state.alive];
    this.found = Uint32Array.from(rows).filter(fits);
    const all = collection.size;
    this.count.textContent = this.found.length === all ? `${write.count(all)} features` : `${write.count(this.found.length)} of ${write.count(all)} features`;
    this.sort();
    this.mark(wanted !== null);
  },

  rowsWith(words) {
    const hay = this.collection.haystack();
    const number = /^#?\d+$/.test(words) ? Number(words.replace("#", "")) : -1;
    const rows = [];
    for (let row = 0; row < hay.length; row += 1) {
      if (hay[row].includes(words) || (number >= 0 && this.collection.at(row).feature === number)) rows.push(row);
    }
    return Uint32Array.from(rows);
  },

  async rowsOfTokens(typed, asked) {
    const { state, collection } = this;
    const plain = typed.trim().toLowerCase();
    const found = [];
    for (const run of collection.runs) {
      const directory = await run.tokenDirectory();
      directory.plain.forEach((text, place) => {
        if (text.startsWith(plain)) found.push({ run, place, text: directory.texts[place], exact: text === plain, count: directory.counts[place] });
      });
    }
    found.sort((a, b) => b.exact - a.exact || b.count - a.count);
    const texts = [...new Set(found.map((each) => each.text))].slice(0, 24);
    const exact = new Set(found.filter((each) => each.exact).map((each) => each.text));
    const chosen = (state.tokens && state.tokens.of === plain && state.tokens.chosen) || (exact.size ? exact : new Set(texts.slice(0, 1)));
    if (asked !== this.asked) return null;
    this.showChips(texts, chosen, plain);
    const rows = new Set();
    for (const each of found) {
      if (!chosen.has(each.text)) continue;
      for (const [feature, reasons] of await each.run.featuresOf(each.place)) {
        if (reasons & state.reasons) rows.add(collection.row(each.run, feature));
      }
    }
    return Uint32Array.from(rows).sort();
  },

  showChips(texts, chosen, plain) {
    const { state } = this;
    const toggle = (text) => {
      const next = new Set(chosen);
      if (!next.delete(text)) next.add(text);
      state.tokens = { of: plain, chosen: next };
      this.search();
    };
    const reasons = [[1, "peaks there"], [2, "fires there"], [4, "raises it"]].map(([bit, label]) =>
      el("button.chip", { type: "button", "aria-pressed": String(Boolean(state.reasons & bit)), onclick: () => { state.reasons ^= bit; this.search(); } }, label),
    );
    const tokens = texts.map((text) => el("button.chip", { type: "button", "aria-pressed": String(chosen.has(text)), onclick: () => toggle(text) }, token(text)));
    this.chips.replaceChildren(
      el("span", {}, texts.length ? "Features for" : "No feature is related to a token that begins like this."), ...tokens,
      ...(texts.length ? [el("span", {}, "that"), ...reasons] : []),
    );
  },

  mark(only) {
    for (const scatter of this.scatters) {
      const offset = this.collection.row(scatter.run, 0);
      if (offset < 0) scatter.mark(only || this.state.which !== "all" ? new Set() : null);
      else if (!only) scatter.mark(null);
      else scatter.mark(new Set([...this.found].map((row) => row - offset).filter((feature) => feature >= 0 && feature < scatter.run.d_sae)));
    }
  },

  choose(row) {
    this.state.row = row;
    const { run, feature } = this.collection.at(row);
    for (const scatter of this.scatters) scatter.choose(scatter.run === run ? feature : -1);
  },

  open(row) {
    this.state.row = row;
    const { run, feature } = this.collection.at(row);
    location.hash = run.link(feature);
  },

  searchKey(event) {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      this.table.element.focus();
      if (event.key === "Enter" && this.rows.length) this.open(this.rows[0]);
    } else if (event.key === "Escape") {
      event.stopPropagation();
      this.state.words = this.input.value = "";
      this.search();
      this.input.blur();
    }
  },

  // The feature before or after one, in the order of the table; null beyond its ends.
  beside(run, feature, step) {
    if (!this.collection || this.collection.row(run, 0) < 0 || !this.rows.length) {
      const next = feature + step;
      return next >= 0 && next < run.d_sae ? { run, feature: next } : null;
    }
    const place = this.rows.indexOf(this.collection.row(run, feature));
    const row = place < 0 ? this.rows[0] : this.rows[place + step];
    return row === undefined ? null : this.collection.at(row);
  },
};
endwise.views.overview = (runs, place) => overview.view(runs, place);
