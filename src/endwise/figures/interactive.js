"use strict";
(() => {
  const page = getComputedStyle(document.documentElement);

  // "var(--name)" or "var(--name) 0.16" (with an opacity), as the style sheet has it now.
  function colour(text) {
    const [, name, opacity] = /^var\((--[\w-]+)\)(?: ([\d.]+))?$/.exec(text) ?? [];
    if (!name) return text;
    const value = page.getPropertyValue(name).trim() || "#777777";
    if (!opacity) return value;
    const parts = [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16));
    return `rgba(${parts.join(",")},${opacity})`;
  }

  function coloured(value, key) {
    if (Array.isArray(value)) return value.map((each) => coloured(each, ""));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, coloured(each, name)]));
    return typeof value === "string" && key.endsWith("color") ? colour(value) : value;
  }

  const AXIS = {
    automargin: true, zeroline: false, ticks: "", showline: false,
    gridcolor: "var(--rule)", color: "var(--muted)", tickfont: { size: 11.5 }, tickangle: 0,
  };

  function axis(own) {
    return { ...AXIS, ...own, title: { text: own.title.text, font: { size: 12.5 }, standoff: 8 } };
  }

  function layout(own) {
    return {
      ...own,
      xaxis: { ...axis(own.xaxis), tickangle: "auto", showline: true, linecolor: "var(--rule)" },
      yaxis: axis(own.yaxis),
      margin: { l: 8, r: 12, t: 12, b: 8 },
      showlegend: false, hovermode: "closest", hoverdistance: 24,
      // Where there is no mouse, a finger on the figure scrolls the page.
      dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: "var(--muted)" },
      hoverlabel: {
        align: "left", bgcolor: "var(--card)", bordercolor: "var(--muted)", font: { size: 12.5, color: "var(--ink)" },
      },
    };
  }

  const CONFIG = {
    displayModeBar: false, displaylogo: false, showTips: false, responsive: true, typesetMath: false, plotlyServerURL: "",
  };

  // The round numbers of a logarithmic axis are those of its whole range; a part of it that is zoomed to has its own.
  function keepTicks(plot, axes) {
    plot.on("plotly_relayout", () => {
      const changes = {};
      for (const [name, { type, range }] of Object.entries(axes)) {
        if (type !== "log") continue;
        const now = plot.layout[name], whole = now.range.every((end, i) => Math.abs(end - range[i]) < 1e-9);
        if ((now.tickmode ?? "array") !== (whole ? "array" : "auto")) changes[`${name}.tickmode`] = whole ? "array" : "auto";
      }
      if (Object.keys(changes).length) Plotly.relayout(plot, changes);
    });
  }

  function draw(chart) {
    const panels = JSON.parse(chart.querySelector('script[type="application/json"]').textContent);
    const plots = [...chart.querySelectorAll(".plot")];
    const hidden = new Set();
    const render = () => plots.map((plot, i) => {
      const data = panels[i].data.map((trace) => ({ ...trace, visible: !hidden.has(trace.name) }));
      return Plotly.react(plot, coloured(data, ""), coloured(layout(structuredClone(panels[i].layout)), ""), CONFIG);
    });
    render();
    plots.forEach((plot, i) => keepTicks(plot, { xaxis: panels[i].layout.xaxis, yaxis: panels[i].layout.yaxis }));
    for (const button of chart.querySelectorAll("button[data-series]")) {
      button.addEventListener("click", () => {
        const name = button.dataset.series, hide = !hidden.has(name);
        hide ? hidden.add(name) : hidden.delete(name);
        button.setAttribute("aria-pressed", String(!hide));
        render();
      });
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
  }

  const start = () => document.querySelectorAll("figure.chart").forEach(draw);
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", start) : start();
})();
