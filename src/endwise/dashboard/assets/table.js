// A table of any length of which only the rows in sight exist. One element has the focus and names the active row.
"use strict";

class VirtualTable {
  static OVERSCAN = 8;

  // columns: [{ name, label, title, fill(cell, row), first: "up" | "down" }]; open(row) and moved(row) are told.
  constructor(columns, { label, open, moved, sorted }) {
    Object.assign(this, { columns, open, moved, sorted });
    this.rows = new Uint32Array(0);
    this.active = 0;
    this.shown = new Map();
    this.spare = [];
    this.head = el("div.table-row.head", { role: "row", "aria-rowindex": 1 }, columns.map((column, place) => this.heading(column, place)));
    this.body = el("div.table-body", { role: "rowgroup" });
    this.scroller = el("div.table-scroll", { role: "presentation" }, this.body);
    this.element = el(
      "div.table",
      { role: "grid", tabindex: 0, "aria-label": label, "aria-colcount": columns.length, onkeydown: (event) => this.key(event) },
      el("div", { role: "rowgroup" }, this.head),
      this.scroller,
    );
    this.scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.scroller);
  }

  heading(column, place) {
    const button = el("button", { type: "button", title: column.title, tabindex: -1, onclick: () => this.sorted(column) }, column.label);
    return el(`div.cell.${column.name}`, { role: "columnheader", "aria-colindex": place + 1, "aria-sort": "none" }, button);
  }

  markSorted(name, descending) {
    this.columns.forEach((column, place) => {
      const direction = descending ? "descending" : "ascending";
      this.head.children[place].setAttribute("aria-sort", column.name === name ? direction : "none");
    });
  }

  get height() {
    return parseFloat(getComputedStyle(this.element).getPropertyValue("--row")) || 40;
  }

  // active: the row that the keyboard is at, if it is among them.
  show(rows, active = -1) {
    this.rows = rows;
    const found = active < 0 ? -1 : rows.indexOf(active);
    this.active = Math.max(0, found);
    this.element.setAttribute("aria-rowcount", rows.length + 1);
    for (const place of [...this.shown.keys()]) this.retire(place);
    if (found < 0) this.scroller.scrollTop = 0;
    this.draw();
    if (found >= 0) this.intoSight();
  }

  draw() {
    const height = this.height;
    this.head.style.setProperty("--bar", `${this.scroller.offsetWidth - this.scroller.clientWidth}px`);
    this.body.style.setProperty("height", `${this.rows.length * height}px`);
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / height) - VirtualTable.OVERSCAN);
    const seen = Math.ceil(this.scroller.clientHeight / height) + 2 * VirtualTable.OVERSCAN;
    const last = Math.min(this.rows.length, first + seen);
    for (const place of [...this.shown.keys()]) if (place < first || place >= last) this.retire(place);
    for (let place = first; place < last; place += 1) if (!this.shown.has(place)) this.fill(place);
    for (const [place, line] of this.shown) {
      line.style.setProperty("transform", `translateY(${place * height}px)`);
      this.markActive(place, line);
    }
    if (this.rows.length) this.element.setAttribute("aria-activedescendant", `row-${this.active}`);
    else this.element.removeAttribute("aria-activedescendant");
  }

  retire(place) {
    const line = this.shown.get(place);
    this.shown.delete(place);
    line.remove();
    this.spare.push(line);
  }

  fill(place) {
    const line = this.spare.pop() || this.empty();
    line.id = `row-${place}`;
    line.setAttribute("aria-rowindex", place + 2);
    line.place = place;
    this.columns.forEach((column, index) => column.fill(line.children[index], this.rows[place]));
    this.shown.set(place, line);
    this.body.append(line);
  }

  empty() {
    const cells = this.columns.map((column, place) => el(`div.cell.${column.name}`, { role: "gridcell", "aria-colindex": place + 1 }));
    return el("div.table-row", { role: "row", onclick: (event) => this.click(event) }, cells);
  }

  markActive(place, line) {
    line.setAttribute("aria-selected", place === this.active);
    line.classList.toggle("active", place === this.active);
  }

  click(event) {
    const line = event.currentTarget;
    this.go(line.place);
    if (!event.target.closest("a") && !String(getSelection())) this.open(this.rows[line.place]);
  }

  go(place) {
    if (!this.rows.length) return;
    this.active = Math.max(0, Math.min(this.rows.length - 1, place));
    this.intoSight();
    this.draw();
    this.moved(this.rows[this.active]);
  }

  intoSight() {
    const [height, room] = [this.height, this.scroller.clientHeight];
    const top = this.active * height;
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    else if (top + height > this.scroller.scrollTop + room) this.scroller.scrollTop = top + height - room;
    this.draw();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor(this.scroller.clientHeight / this.height) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key in steps) {
      event.preventDefault();
      this.go(this.active + steps[event.key]);
    } else if (event.key === "Enter" && this.rows.length && event.target === this.element) {
      event.preventDefault();
      this.open(this.rows[this.active]);
    }
  }
}

// The order of `rows` by a column's keys: what has no key comes last, either way; equal keys keep their order.
function sortRows(rows, keys, descending) {
  const known = rows.filter((row) => !Number.isNaN(keys[row]));
  const unknown = rows.filter((row) => Number.isNaN(keys[row]));
  const sign = descending ? -1 : 1;
  known.sort((a, b) => sign * (keys[a] - keys[b]) || a - b);
  const sorted = new Uint32Array(rows.length);
  sorted.set(known);
  sorted.set(unknown, known.length);
  return sorted;
}
