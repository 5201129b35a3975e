// What fires on a text that someone types, and what the model predicts there, clean and spliced. Only where served.
"use strict";

const textView = {
  state: { text: "", run: 0, read: null, at: 0, feature: null },

  async view(runs) {
    const { state } = this;
    await Promise.all(runs.map((run) => run.overview()));
    this.runs = runs;
    this.result = el("div.reading");
    const area = el("textarea", {
      id: "text", rows: 3, spellcheck: "false", placeholder: "Once upon a time…",
      onkeydown: (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.read(area.value);
      },
    });
    area.value = state.text;
    this.failed = el("p.error", { role: "alert", hidden: true });
    this.button = el("button.button.primary", { type: "button", onclick: () => this.read(area.value) }, "Read");
    const which = runs.length < 2 ? null : overview.select("With", Object.fromEntries(runs.map((run, place) => [place, run.name])), String(state.run), (value) => {
      state.run = Number(value);
      if (area.value.trim()) this.read(area.value);
    });
    const element = el(
      "div.text",
      {},
      el("header.title", {}, el("p.eyebrow", {}, runs[state.run].model), el("h1", {}, "Which features fire on a text?")),
      el("section.card", {}, el("label", { for: "text" }, "Text"), area, el("div.toolbar", {}, this.button, which, el("span.note", {}, "Ctrl + Enter reads it.")), this.failed),
      this.result,
    );
    return { element, title: "Read a text", ready: () => (state.read ? this.show() : area.focus()) };
  },

  async read(text) {
    const { state } = this;
    const asked = (this.asked = (this.asked || 0) + 1);
    this.failed.hidden = true;
    this.button.disabled = true;
    this.button.textContent = "Reading…";
    try {
      const answer = await fetch("api/text", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ run: state.run, text }),
      });
      const read = await answer.json();
      if (asked !== this.asked) return;
      if (!answer.ok) throw new Error(read.error || "The server could not read the text.");
      Object.assign(state, { text, read, readBy: state.run, at: Math.max(0, read.tokens.length - 1), feature: null });
      this.show();
      say(`${read.tokens.length} tokens read.`);
    } catch (error) {
      const gone = error instanceof TypeError;
      this.failed.textContent = gone ? "The server does not answer. Start it again: endwise serve RUN" : error.message;
      this.failed.hidden = false;
    } finally {
      this.button.disabled = false;
      this.button.textContent = "Read";
    }
  },

  show() {
    const { state } = this;
    this.run = this.runs[state.readBy];
    this.line = el("div.line", { role: "group", "aria-label": "Tokens", onkeydown: (event) => this.key(event) }, state.read.tokens.map((text, at) => this.button_(text, at)));
    this.line.addEventListener("pointerover", (event) => this.hover(event));
    this.line.addEventListener("pointerleave", () => tip.hide());
    this.shading = el("p.note");
    this.detail = el("div.detail");
    this.list = el("div");
    this.result.replaceChildren(
      el("section.card", { "data-kind": this.run.kind }, el("h2", {}, "Token by token"), this.summary(), this.line, this.shading),
      feature.card("Features of the whole text", this.list, el("p.note", {}, "By their greatest activation; choose one to shade the text with it.")),
      this.detail,
    );
    this.update();
  },

  summary() {
    const known = this.state.read.ce.filter((pair) => pair !== null);
    const mean = (which) => known.reduce((sum, pair) => sum + pair[which], 0) / known.length;
    const counted = this.state.read.l0.filter((_, at) => this.state.read.counts[at]);
    const l0 = counted.reduce((sum, count) => sum + count, 0) / Math.max(1, counted.length);
    const words = [`${write.count(this.state.read.tokens.length)} tokens`, `L0 ${write.number(l0)}`];
    if (known.length) words.push(`CE ${write.number(mean(0))} clean, ${write.number(mean(1))} spliced`);
    return el("p.eyebrow", {}, words.join(" · "));
  },

  button_(text, at) {
    return el("button.t", { type: "button", "data-at": at, tabindex: at === this.state.at ? 0 : -1, onclick: () => this.choose(at) }, text.replaceAll("\n", "⏎"));
  },

  choose(at) {
    this.state.at = Math.max(0, Math.min(this.state.read.tokens.length - 1, at));
    this.update();
    this.line.children[this.state.at].focus({ preventScroll: true });
  },

  key(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.choose(this.state.at + steps[event.key]);
  },

  hover(event) {
    const hit = event.target.closest(".t");
    if (!hit) return tip.hide();
    const at = Number(hit.dataset.at);
    const { ce, kl, l0 } = this.state.read;
    const facts = [`${l0[at]} features`, `KL ${write.number(kl[at])}`];
    if (ce[at]) facts.push(`next token: CE ${write.number(ce[at][0])} clean, ${write.number(ce[at][1])} spliced`);
    tip.at(event.clientX, event.clientY, token(hit.textContent), el("br"), facts.join(" · "));
  },

  update() {
    const { state } = this;
    const { read } = state;
    const chosen = read.over_text.find((each) => each.feature === state.feature);
    const values = chosen ? chosen.values : read.kl;
    const most = Math.max(...values, 1e-9);
    [...this.line.children].forEach((button, at) => {
      const share = Math.max(0, values[at]) / most;
      button.style.setProperty("--share", share > 0 ? `${(6 + 52 * share).toFixed(1)}%` : "0%");
      button.classList.toggle("on", share > 0);
      button.setAttribute("aria-pressed", at === state.at);
      button.tabIndex = at === state.at ? 0 : -1;
    });
    this.shading.textContent = chosen
      ? `Shaded by feature ${state.feature}, at most ${write.number(most)}.`
      : `Shaded by how far the spliced prediction strays from the clean one (KL), at most ${write.number(most)} nats.`;
    this.detail.replaceChildren(this.active(), this.predictions());
    this.list.replaceChildren(this.overText());
  },

  active() {
    const { read, at } = this.state;
    const found = read.active[at];
    const more = read.l0[at] - found.length;
    const words = read.counts[at] ? `${read.l0[at]} in all${more > 0 ? `, ${found.length} shown` : ""}.` : "This position was left out in training: it keeps its own activation.";
    return el("section.card", { "data-kind": this.run.kind }, el("h2", {}, "Active at ", token(read.tokens[at])), this.features(found), el("p.note", {}, words));
  },

  features(found) {
    const most = Math.max(...found.map(([, value]) => value), 1e-9);
    return el("ol.others", {}, found.map(([number, value]) => {
      const top = this.run.top(number);
      const words = this.run.explanation(number);
      return el("li", {}, el("a", { href: this.run.link(number) }, String(number)), el("span.what", {}, top === null ? "" : token(top), words ? el("span.words", {}, words) : ""),
        el("span.meter", { "--share": `${((100 * value) / most).toFixed(1)}%` }), el("span.value", {}, write.number(value, 3, true)));
    }));
  },

  predictions() {
    const { read, at } = this.state;
    const next = read.tokens[at + 1];
    const list = (title, rows, ce) => el("div", {}, el("h3", {}, title), el("ol.effects.raises", {}, rows.map(([text, share]) =>
      el(`li${text === next ? ".true" : ""}`, {}, token(text), el("span.meter", { "--share": `${(100 * share).toFixed(1)}%` }), el("span.value", {}, write.percent(share, true))))),
      ce === null ? null : el("p.note", {}, `CE ${write.number(ce)}`));
    const ce = read.ce[at] || [null, null];
    const words = next === undefined ? "The text ends here." : ["The next token is ", token(next), "."];
    return el("section.card", { "data-kind": this.run.kind }, el("h2", {}, "Predicted after ", token(read.tokens[at])),
      el("div.two", {}, list("Clean", read.clean[at], ce[0]), list("Spliced", read.spliced[at], ce[1])), el("p.note", {}, words, ` KL ${write.number(read.kl[at])}.`));
  },

  overText() {
    const { state } = this;
    return el("div.chips", {}, state.read.over_text.map(({ feature: number, values }) => {
      const top = this.run.top(number);
      return el("button.chip", { type: "button", "aria-pressed": String(state.feature === number), onclick: () => {
        state.feature = state.feature === number ? null : number;
        this.update();
      } }, el("b", {}, String(number)), " ", top === null ? "" : token(top), ` ${write.number(Math.max(...values))}`);
    }));
  },
};
endwise.views.text = (runs) => textView.view(runs);
