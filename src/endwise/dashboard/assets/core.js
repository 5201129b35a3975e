// Data handed over by scripts, elements, and numbers in words.
"use strict";

const endwise = {
  received: new Map(),
  waiting: new Map(),
  views: {},

  // What a data script calls.
  receive(key, value) {
    this.received.set(key, value);
  },

  // The value of a data file, whose script is added to the page when it is first asked for. A page opened from a disk
  // may not fetch, but it may do this.
  load(key, path) {
    if (this.received.has(key)) return Promise.resolve(this.received.get(key));
    if (!this.waiting.has(key)) {
      const loaded = new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = path;
        script.onload = () => {
          script.remove();
          if (this.received.has(key)) resolve(this.received.get(key));
          else reject(new Error(`${path} does not hold what it should. Write the dashboard again.`));
        };
        script.onerror = () => reject(new Error(`${path} could not be read. Write the dashboard again.`));
        document.head.append(script);
      });
      this.waiting.set(key, loaded.finally(() => this.waiting.delete(key)));
    }
    return this.waiting.get(key);
  },
};

function unpacked(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Kind(bytes.buffer);
}

// An element; strings among its children become text, never markup. `on…` are listeners, `--…` custom properties.
function el(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  return dressed(made, properties, children);
}

function svg(tag, properties = {}, ...children) {
  return dressed(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);
}

function dressed(made, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) made.style.setProperty(key, value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

const write = {
  count: (value) => Math.round(value).toLocaleString("en"),

  // Three significant digits; very small and very large as powers of ten. full: with zeros at the end, for columns.
  number(value, digits = 3, full = false) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e-3 && size < 1e5) {
      const least = full && size < 10 ** digits ? { minimumSignificantDigits: digits } : {};
      return minus(Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: 9, ...least }));
    }
    const [mantissa, power] = value.toExponential(digits - 1).split("e");
    return `${minus(mantissa)}×10${raised(Number(power))}`;
  },
  signed: (value, digits, full) => (value > 0 ? "+" : "") + write.number(value, digits, full),
  percent(share, full) {
    if (Number.isNaN(share)) return "–";
    return share === 0 ? "0 %" : `${write.number(100 * share, 3, full)} %`;
  },
  // A token where its ends must be seen.
  token: (text) => (text === "" ? "(empty)" : text.replaceAll(" ", "␣").replaceAll("\n", "⏎")),
};

function minus(text) {
  return text.replace("-", "−");
}

function raised(power) {
  const digits = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  return [...String(power)].map((digit) => digits[digit]).join("");
}

function token(text, classes = "") {
  return el(`span.token${classes}`, {}, write.token(text));
}

function say(text) {
  document.getElementById("status").textContent = text;
}

// What floats beside the pointer.
const tip = {
  at(x, y, ...content) {
    const box = document.getElementById("tip");
    box.replaceChildren(...content);
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const left = Math.max(8, Math.min(x + 14, innerWidth - width - 8));
    const top = y + 18 + height > innerHeight ? y - height - 12 : y + 18;
    box.style.setProperty("transform", `translate(${left}px, ${Math.max(8, top)}px)`);
  },
  hide() {
    document.getElementById("tip").hidden = true;
  },
};
addEventListener("scroll", tip.hide, { passive: true, capture: true });
