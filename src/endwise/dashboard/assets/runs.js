// The runs of the site, and each one's columns.
"use strict";

class Run {
  constructor(place, facts, folder) {
    Object.assign(this, facts);
    this.place = place;
    this.data = `${folder}/${place}`;
    this.kindName = this.label || { e2e_ds: "e2e+ds" }[this.kind] || this.kind;
  }

  async overview() {
    if (!this.columns) {
      const read = await endwise.load(`${this.place}/overview`, `${this.data}/overview.js`);
      const floats = (name) => unpacked(read[name], Float32Array);
      const firings = unpacked(read.firings, Float64Array);
      this.columns = {
        firings,
        density: firings.map((count) => count / Math.max(1, this.tokens)),
        mean: floats("mean"),
        max: floats("max"),
        importance: floats("importance"),
        ce: floats("ce"),
        detection: read.detection && floats("detection"),
        fuzzing: read.fuzzing && floats("fuzzing"),
        top: unpacked(read.top, Int32Array),
        boosted: unpacked(read.boosted, Int32Array),
        explanations: read.explanations,
      };
      this.texts = read.texts;
      this.measured = this.columns.importance.some((value) => !Number.isNaN(value));
    }
    return this.columns;
  }

  // What a feature's page shows.
  async page(feature) {
    const shard = Math.floor(feature / this.shard);
    const read = await endwise.load(`${this.place}/features-${shard}`, `${this.data}/features-${shard}.js`);
    return { ...read.features[feature - shard * this.shard], texts: read.texts };
  }

  top(feature) {
    const place = this.columns.top[feature];
    return place < 0 ? null : this.texts[place];
  }

  boosted(feature) {
    const place = this.columns.boosted[feature];
    return place < 0 ? null : this.texts[place];
  }

  explanation(feature) {
    return (this.columns.explanations && this.columns.explanations[feature]) || "";
  }

  isAlive(feature) {
    return this.columns.firings[feature] > 0;
  }

  link(feature) {
    return `#/run/${this.place}/feature/${feature}`;
  }

  swatch() {
    return el("span.swatch", { "data-kind": this.kind, title: this.kindName });
  }

  // The tokens that have features, read when a token is first searched.
  async tokenDirectory() {
    if (!this.directory) {
      const read = await endwise.load(`${this.place}/tokens`, `${this.data}/tokens.js`);
      const plain = read.texts.map((text) => text.trim().toLowerCase());
      this.directory = { ...read, plain, counts: unpacked(read.counts, Int32Array) };
    }
    return this.directory;
  }

  // Feature → reasons (1 peaks there, 2 fires there, 4 raises it), of one token of the directory.
  async featuresOf(place) {
    const { shard } = await this.tokenDirectory();
    const number = Math.floor(place / shard);
    const read = await endwise.load(`${this.place}/tokens-${number}`, `${this.data}/tokens-${number}.js`);
    const [starts, entries] = [unpacked(read.starts, Int32Array), unpacked(read.entries, Int32Array)];
    const own = entries.subarray(starts[place - number * shard], starts[place - number * shard + 1]);
    return Array.from(own, (entry) => [entry >> 3, entry & 7]);
  }
}

// Several runs' features as one table: row = offset of the run + feature.
class Collection {
  constructor(runs) {
    this.runs = runs;
    this.offsets = [];
    this.size = 0;
    for (const run of runs) {
      this.offsets.push(this.size);
      this.size += run.d_sae;
    }
    this.cache = new Map();
  }

  at(row) {
    let place = this.runs.length - 1;
    while (this.offsets[place] > row) place -= 1;
    return { run: this.runs[place], feature: row - this.offsets[place] };
  }

  row(run, feature) {
    const place = this.runs.indexOf(run);
    return place < 0 ? -1 : this.offsets[place] + feature;
  }

  // Numbers to sort by, NaN where there is none.
  keys(name) {
    if (!this.cache.has(name)) this.cache.set(name, this.made(name));
    return this.cache.get(name);
  }

  made(name) {
    const keys = new Float64Array(this.size);
    if (name === "feature") return keys.map((_, row) => this.at(row).feature);
    if (name === "top" || name === "boosted" || name === "explanation") return this.ranks(name);
    this.runs.forEach((run, place) => keys.set(run.columns[name] || new Float64Array(run.d_sae).fill(NaN), this.offsets[place]));
    if (name !== "firings" && name !== "density") {
      const firings = this.keys("firings");
      for (let row = 0; row < this.size; row += 1) if (firings[row] === 0) keys[row] = NaN;
    }
    return keys;
  }

  // Texts by their place in the alphabet, so that they sort as fast as numbers.
  ranks(name) {
    const texts = this.strings(name);
    const different = [...new Set(texts)].filter((text) => text).sort((a, b) => (a < b ? -1 : 1));
    const rank = new Map(different.map((text, place) => [text, place]));
    return Float64Array.from(texts, (text) => (text ? rank.get(text) : NaN));
  }

  strings(name) {
    return this.runs.flatMap((run) => {
      const of = { top: (f) => run.top(f), boosted: (f) => run.boosted(f), explanation: (f) => run.explanation(f) }[name];
      return Array.from({ length: run.d_sae }, (_, feature) => (of(feature) || "").trim().toLowerCase());
    });
  }

  // Every row's searchable text.
  haystack() {
    if (!this.hay) {
      const [top, boosted, explanation] = ["top", "boosted", "explanation"].map((name) => this.strings(name));
      this.hay = top.map((text, row) => `${text}\n${boosted[row]}\n${explanation[row]}`);
    }
    return this.hay;
  }
}
