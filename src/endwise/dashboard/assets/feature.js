// A feature's page: where it fires, how strongly, what it does to the predictions, and what lies near it.
"use strict";

const feature = {
  FEW: { most: 8, quantile: 3 }, // contexts shown before the rest is asked for

  async view(runs, place, number) {
    const run = runs[place];
    if (!run || !Number.isInteger(number) || number < 0 || number >= run.d_sae) throw new Error("There is no such feature.");
    await Promise.all(runs.map((each) => each.overview()));
    const page = await run.page(number);
    if (overview.collection) overview.state.row = overview.collection.row(run, number);
    const { columns } = run;
    const alive = run.isAlive(number);
    const element = el(
      "div.feature",
      { "data-kind": run.kind },
      this.heading(run, number),
      this.facts(run, number),
      alive ? null : el("p.note", {}, "It never fired on the text that was harvested, so there is nothing to show of where it does."),
      el(
        "div.columns",
        {},
        el("div.main", {}, steering.card(run, number, columns.max[number]), this.patterns(page), this.contexts(page, columns.max[number])),
        el("div.side", {}, this.histogram(page), this.logits(page), this.nearest(runs, place, page), this.together(run, page)),
      ),
    );
    return { element, title: `Feature ${number} · ${run.name}` };
  },

  heading(run, number) {
    const step = (by, label, key) => {
      const to = overview.beside(run, number, by);
      return to
        ? el("a.button", { href: to.run.link(to.feature), title: `${label} (${key})`, "data-step": by }, label)
        : el("span.button.off", { "aria-disabled": "true" }, label);
    };
    const { columns } = run;
    const words = run.explanation(number);
    const scores = ["detection", "fuzzing"]
      .filter((name) => columns[name] && !Number.isNaN(columns[name][number]))
      .map((name) => el("span.score", { title: `Balanced accuracy of ${name}: 0.5 is chance` }, `${name} ${columns[name][number].toFixed(2)}`));
    return el(
      "header.title",
      {},
      el("nav.steps", { "aria-label": "Features" }, el("a.button", { href: "#/", title: "All features (Esc)" }, "All features"), step(-1, "Previous", "p"), step(1, "Next", "n")),
      el("p.eyebrow", {}, run.swatch(), `${run.name} · ${run.kindName} · ${run.site}`),
      el("h1", {}, `Feature ${number}`),
      words ? el("p.explanation", {}, words, ...scores.flatMap((score) => [" ", score])) : null,
    );
  },

  facts(run, number) {
    const { columns } = run;
    const value = (name) => columns[name][number];
    const rank = (name) => {
      if (Number.isNaN(value(name)) || !run.isAlive(number)) return "";
      const before = columns[name].reduce((count, other, at) => count + (columns.firings[at] > 0 && other > value(name)), 0);
      return `rank ${write.count(before + 1)} of ${write.count(run.alive)}`;
    };
    const tile = (label, shown, note) => el("div", {}, el("dt", {}, label), el("dd", {}, shown, note ? el("small", {}, note) : ""));
    const firings = value("firings");
    const every = run.tokens / firings;
    const often = firings ? `one token in ${every < 9.95 ? every.toFixed(1) : write.count(every)}` : "dead";
    return el(
      "dl.tiles",
      {},
      tile("Density", write.percent(value("density")), often),
      tile("Firings", write.count(firings), `of ${write.count(run.tokens)} tokens`),
      tile("Importance", write.number(run.isAlive(number) ? value("importance") : NaN), run.measured ? ["to second order", rank("importance") || "nats per token"].join(", ") : "not measured"),
      tile("CE without it", write.signed(run.isAlive(number) ? value("ce") : NaN), "to first order, nats per token"),
      tile("Greatest activation", write.number(value("max")), `mean ${write.number(value("mean"))}`),
    );
  },

  card(title, ...content) {
    return el("section.card", {}, el("h2", {}, title), ...content);
  },

  // What predicts it, of `endwise patterns`: for each place the tokens that serve, or any.
  patterns(page) {
    if (!page.p) return null;
    const [f1, precision, recall, correlation] = page.p.s.map((value) => write.number(value));
    const scores = page.p.s[0] === null ? "It fires too seldom for a score." : `On other text: F1 ${f1} (precision ${precision}, recall ${recall}), correlation ${correlation}.`;
    const place = (each) => {
      if (each === 0) return el("span.any", { title: "Any token" }, "any");
      const [texts, more] = each;
      const shown = texts.flatMap((text, at) => [at ? " | " : null, token(page.texts[text])]);
      return el("span.place", {}, ...shown, more ? ` + ${more}` : null);
    };
    const rows = page.p.l.map(([places, activation, contexts]) =>
      el("li", {}, el("span.activation", { title: `Mean of ${contexts} contexts` }, write.number(activation, 3, true)), el("p", {}, places.map(place))));
    const rest = page.p.n > rows.length ? ` ${page.p.n - rows.length} more are not shown.` : "";
    const none = rows.length ? "" : "No short suffix keeps its activation. ";
    return this.card("Patterns that predict it", rows.length ? el("ol.patterns", {}, rows) : null, el("p.note", {}, `${none}${scores}${rest}`));
  },

  contexts(page, max) {
    if (!page.x.length) return this.card("Where it fires", el("p.note", {}, "No text was kept."));
    const groups = new Map();
    for (const context of page.x) groups.set(context[0], [...(groups.get(context[0]) || []), context]);
    const quantiles = Math.max(...groups.keys()) + 1;
    const order = [...groups.keys()].sort((a, b) => (a === -1 ? -1 : b === -1 ? 1 : b - a));
    const named = (group) => (group === -1 ? "Where it fires most" : `Quantile ${group + 1} of ${quantiles} of its activations`);
    const cards = (some) => some.map((group) => this.card(named(group), ...this.few(groups.get(group), group === -1 ? this.FEW.most : this.FEW.quantile, page, max)));
    return el("div.examples", {}, cards(order.filter((group) => group === -1)), el("div.quantiles", {}, cards(order.filter((group) => group !== -1))));
  },

  few(contexts, count, page, max) {
    const list = el("ol.contexts", {}, contexts.slice(0, count).map((context) => this.context(context, page, max)));
    list.addEventListener("pointerover", (event) => this.value(event));
    list.addEventListener("pointerleave", () => tip.hide());
    list.addEventListener("click", (event) => this.value(event));
    const rest = contexts.slice(count);
    if (!rest.length) return [list];
    const more = el("button.button", { type: "button" }, `Show ${rest.length} more`);
    more.addEventListener("click", () => {
      list.append(...rest.map((context) => this.context(context, page, max)));
      more.remove();
    });
    return [list, more];
  },

  context([, sequence, position, peak, tokens, activations], page, max) {
    const shown = tokens.map((place, at) => {
      const activation = activations[at] || 0;
      const share = max > 0 ? Math.max(0, Math.min(1, activation / max)) : 0;
      const text = page.texts[place].replaceAll("\n", "⏎");
      return el(`span.t${share > 0 ? ".on" : ""}${at === peak ? ".peak" : ""}`, { "--share": share > 0 ? `${(12 + 46 * share).toFixed(1)}%` : null, "data-value": activation }, text);
    });
    const where = `sequence ${sequence}, position ${position}`;
    return el("li", {}, el("span.activation", { title: where }, write.number(activations[peak], 3, true)), el("p", {}, shown));
  },

  value(event) {
    const hit = event.target.closest(".t");
    if (!hit) return tip.hide();
    tip.at(event.clientX, event.clientY, token(hit.textContent), ` ${write.number(Number(hit.dataset.value))}`);
  },

  histogram(page) {
    if (!page.h.length) return null;
    const [width, height, bottom] = [360, 132, 20];
    const most = Math.max(...page.h, 1);
    const each = width / page.h.length;
    const total = page.h.reduce((sum, count) => sum + count, 0);
    const bars = page.h.map((count, at) => {
      const tall = (count / most) * (height - bottom - 4);
      const words = `${write.number(page.e[at])} to ${write.number(page.e[at + 1])}: ${write.count(count)} firings`;
      const bar = svg("rect", { x: at * each + 0.75, y: 4, width: Math.max(1, each - 1.5), height: height - bottom - 4, class: "catch" });
      bar.addEventListener("pointermove", (move) => tip.at(move.clientX, move.clientY, words));
      return [svg("rect", { x: at * each + 0.75, y: height - bottom - tall, width: Math.max(1, each - 1.5), height: tall, rx: 1, class: "bar-of" }), bar];
    });
    const marks = [0, 0.25, 0.5, 0.75, 1].map((share) => {
      const at = Math.round(share * page.h.length);
      const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
      return svg("text", { x: at * each, y: height - 4, "text-anchor": anchor }, write.number(page.e[at], 2));
    });
    const words = `Histogram of ${write.count(total)} activations from ${write.number(page.e[0])} to ${write.number(page.e.at(-1))}; the fullest bin has ${write.count(most)}.`;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words, class: "histogram" }, bars.flat(), svg("line", { x1: 0, x2: width, y1: height - bottom + 0.5, y2: height - bottom + 0.5 }), marks);
    picture.addEventListener("pointerleave", () => tip.hide());
    return this.card("How strongly it fires", picture, el("p.note", {}, `Firings by activation; the fullest bin has ${write.count(most)}.`));
  },

  logits(page) {
    const list = (places, values, classes) => {
      const most = Math.max(...values.map(Math.abs), 1e-12);
      return el(`ol.effects.${classes}`, {}, places.map((place, at) =>
        el("li", {}, token(page.texts[place]), el("span.meter", { "--share": `${((100 * Math.abs(values[at])) / most).toFixed(1)}%` }), el("span.value", {}, write.signed(values[at], 3, true)))));
    };
    if (!page.b.length && !page.s.length) return null;
    return this.card(
      "Tokens it makes likelier, and less likely",
      el("div.two", {}, list(page.b, page.bl, "raises"), list(page.s, page.sl, "lowers")),
      el("p.note", {}, "Its direction’s effect on the logits, without the blocks between."),
    );
  },

  others(run, features, values) {
    if (!features.length) return el("p.note", {}, "None.");
    return el("ol.others", {}, features.map((other, at) => {
      const top = run.top(other);
      const words = run.explanation(other);
      return el("li", {}, el("a", { href: run.link(other) }, String(other)), el("span.what", {}, top === null ? "" : token(top), words ? el("span.words", {}, words) : ""),
        el("span.meter", { "--share": `${(100 * Math.max(0, values[at])).toFixed(1)}%` }), el("span.value", {}, write.number(values[at], 3, true)));
    }));
  },

  nearest(runs, place, page) {
    if (!page.n.length) return null;
    const own = page.n.find(([other]) => other === place);
    const rest = page.n.filter(([other]) => other !== place);
    const parts = own ? [el("h3", {}, "in its own dictionary"), this.others(runs[place], own[1], own[2])] : [];
    for (const [other, features, cosines] of rest) {
      parts.push(el("h3", {}, runs[other].swatch(), `in ${runs[other].name}`), this.others(runs[other], features, cosines));
    }
    return this.card("Nearest directions", ...parts, el("p.note", {}, "By cosine of the decoder directions, among alive features."));
  },

  together(run, page) {
    if (!page.c.length) return null;
    return this.card("Fires together with", this.others(run, page.c, page.cj), el("p.note", {}, "Tokens at which both fire / at which either does."));
  },
};
endwise.views.feature = (runs, place, number) => feature.view(runs, place, number);
