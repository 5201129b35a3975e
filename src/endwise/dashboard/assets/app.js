// Routes, keyboard, and the start.
"use strict";

const app = {
  served: false,
  found: Promise.resolve(false), // whether a model stands behind the page

  start() {
    const site = endwise.received.get("site");
    if (!site) return this.fail(new Error("data/site.js could not be read. Write the dashboard again: endwise dashboard RUN"));
    this.runs = site.runs.map((facts, place) => new Run(place, facts, site.data));
    this.navigation();
    this.colours();
    addEventListener("hashchange", () => this.route());
    addEventListener("keydown", (event) => this.key(event));
    document.getElementById("to-help").addEventListener("click", () => this.help());
    if (location.protocol === "http:") this.found = this.findServer();
    this.route();
  },

  navigation() {
    const links = this.runs.length < 2 ? [] : this.runs.map((run) => el("a", { href: `#/run/${run.place}`, "data-kind": run.kind, title: run.name }, run.swatch(), run.name));
    document.getElementById("runs").replaceChildren(...links);
  },

  colours() {
    const button = document.getElementById("theme");
    const show = () => {
      const name = theme.get();
      button.textContent = { light: "☀", dark: "☾" }[name] || "◐";
      button.setAttribute("aria-label", `Colours: ${theme.names[name]}`);
      button.title = `Colours: ${theme.names[name]}`;
    };
    button.addEventListener("click", () => {
      const names = Object.keys(theme.names);
      theme.set(names[(names.indexOf(theme.get()) + 1) % names.length]);
      show();
      Scatter.redraw();
    });
    show();
  },

  async findServer() {
    const answer = await fetch("api/about").catch(() => null);
    this.served = Boolean(answer && answer.ok && (answer.headers.get("Content-Type") || "").startsWith("application/json"));
    document.getElementById("to-text").hidden = !this.served;
    return this.served;
  },

  async route() {
    tip.hide();
    const asked = (this.asked = (this.asked || 0) + 1);
    const [, name, run, , number] = location.hash.split("/");
    try {
      const view = await this.find(name, Number(run), number);
      if (asked !== this.asked) return;
      const main = document.getElementById("view");
      main.replaceChildren(view.element);
      document.title = view.title;
      await (view.ready && view.ready());
      this.markRun(name === "run" ? Number(run) : null);
      if (this.moved) this.settle(main);
      this.moved = true;
      main.dataset.shown = location.hash || "#/";
      performance.mark("endwise-shown");
    } catch (error) {
      this.fail(error);
    }
  },

  find(name, run, number) {
    if (name === "text") return endwise.views.text(this.runs);
    if (name === "run" && number !== undefined) return endwise.views.feature(this.runs, run, Number(number));
    const place = name === "run" && this.runs[run] ? run : null;
    return endwise.views.overview(this.runs, place);
  },

  // Where the reader is after a step: at the top of a feature, at the table of the overview.
  settle(main) {
    const table = main.querySelector(".table");
    if (!table) scrollTo(0, 0);
    (table || main).focus({ preventScroll: !table });
  },

  markRun(place) {
    [...document.getElementById("runs").children].forEach((link, at) => {
      if (at === place) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
  },

  fail(error) {
    document.getElementById("view").replaceChildren(el("p.error", { role: "alert" }, error.message), el("p", {}, el("a", { href: "#/" }, "All features")));
  },

  help() {
    document.getElementById("help").showModal();
  },

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
    const typing = event.target.closest("input, textarea, select");
    if (event.key === "Escape" && !location.hash.endsWith("#/")) {
      if (typing) typing.blur();
      else if (location.hash.includes("feature") || location.hash.startsWith("#/text")) location.hash = "#/";
      return;
    }
    if (typing) return;
    const acts = {
      "/": () => this.toSearch(),
      "?": () => this.help(),
      n: () => this.step(1),
      p: () => this.step(-1),
      t: () => this.served && (location.hash = "#/text"),
    };
    if (!(event.key in acts)) return;
    event.preventDefault();
    acts[event.key]();
  },

  async toSearch() {
    if (!document.getElementById("search")) {
      location.hash = "#/";
      await this.route();
    }
    const search = document.getElementById("search");
    search.focus();
    search.select();
  },

  step(by) {
    const link = document.querySelector(`[data-step="${by}"]`);
    if (link) location.hash = link.getAttribute("href");
  },
};
app.start();
