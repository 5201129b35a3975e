// Light, dark, or as the system has it; set before anything is drawn.
"use strict";

const theme = {
  names: { auto: "as the system has them", light: "light", dark: "dark" },
  get() {
    try {
      return localStorage.getItem("endwise-theme") || "auto";
    } catch {
      return theme.kept || "auto"; // a browser may keep nothing for files
    }
  },
  set(name) {
    theme.kept = name;
    try {
      localStorage.setItem("endwise-theme", name);
    } catch {
      // it lasts as long as the page
    }
    theme.apply();
  },
  apply() {
    const name = theme.get();
    if (name in theme.names && name !== "auto") document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
  },
};
theme.apply();
