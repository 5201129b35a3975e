// A text continued with and without a feature, by the strength that a slider gives. Only where served.
"use strict";

const steering = {
  state: { text: "", how: "add", strength: 1 },
  TOKENS: 40,

  // Hidden until a model is known to stand behind the page.
  card(run, number, max) {
    const { state } = this;
    const known = max > 0;
    const view = { run, number, unit: known ? max : 1, asked: 0 };
    const area = el("textarea", { rows: 2, spellcheck: "false", placeholder: "Once upon a time…", oninput: () => (state.text = area.value) });
    area.value = state.text;
    const slider = el("input", { type: "range", min: -3, max: 3, step: 0.05, value: state.strength, oninput: () => label(), onchange: () => view.made && go() });
    const words = el("output");
    const label = () => {
      state.strength = Number(slider.value);
      const by = state.strength * view.unit;
      const sign = state.how === "add" ? write.signed(by) : write.number(by);
      words.replaceChildren(el("b", {}, sign), known ? ` = ${write.number(state.strength)} × its greatest activation` : " (it never fired)");
    };
    const how = overview.select("Activation", { add: "Add to it", set: "Set it to" }, state.how, (value) => {
      state.how = value;
      label();
      if (view.made) go();
    });
    const button = el("button.button.primary", { type: "button", onclick: () => go() }, "Continue the text");
    const failed = el("p.error", { role: "alert", hidden: true });
    const result = el("div");
    const go = () => this.ask(view, { area, button, failed, result });
    label();
    const element = feature.card(
      "Steer a text with it",
      el("label.wide", {}, "Text", area),
      el("div.toolbar.steer", {}, how, el("label.strength", {}, "Strength", slider), words, button),
      failed,
      result,
    );
    element.hidden = true;
    app.found.then((served) => (element.hidden = !served));
    return element;
  },

  async ask(view, { area, button, failed, result }) {
    const { state } = this;
    const asked = ++view.asked;
    failed.hidden = true;
    button.textContent = "Continuing…";
    const body = { run: view.run.place, text: area.value, feature: view.number, how: state.how, by: state.strength * view.unit, tokens: this.TOKENS };
    try {
      const answer = await fetch("api/steer", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
      const made = await answer.json();
      if (asked !== view.asked) return;
      if (!answer.ok) throw new Error(made.error || "The server could not continue the text.");
      view.made = true;
      result.replaceChildren(...this.texts(made));
      say("Both texts are there.");
    } catch (error) {
      if (asked !== view.asked) return;
      failed.textContent = error instanceof TypeError ? "The server does not answer. Start it again: endwise serve RUN" : error.message;
      failed.hidden = false;
    } finally {
      if (asked === view.asked) button.textContent = "Continue the text";
    }
  },

  texts(made) {
    const prompt = made.prompt.join("");
    const text = (title, tokens) => el("div", {}, el("h3", {}, title), el("p.continued", {}, el("span", {}, prompt), tokens.join("")));
    const inside = made.kl_in_prompt === null ? "" : `, ${write.number(made.kl_in_prompt)} over those of the prompt’s`;
    return [
      el("div.two.texts", {}, text("Clean", made.clean), text("Steered", made.steered)),
      el("p.note", {}, `KL(clean ‖ steered) of the next token, both given the clean text: ${write.number(made.kl)} nats, mean over the predictions of its ${made.clean.length} new ${made.clean.length === 1 ? "token" : "tokens"}${inside}.`),
    ];
  },
};
