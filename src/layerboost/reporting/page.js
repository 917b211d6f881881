(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);

  // Colours are written as var(--name) so that one figure serves the light, dark and printed palette.
  const resolve = (value, style) => {
    if (typeof value === "string") return value.replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
    if (Array.isArray(value)) return value.map((item) => resolve(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, style)]));
    }
    return value;
  };

  const draw = () => {
    const style = getComputedStyle(root);
    for (const [name, figure] of Object.entries(figures)) {
      const element = document.getElementById(name);
      const { data, layout } = resolve(figure, style);
      // The paper's width is not known yet; this one fits A4 and Letter.
      if (root.classList.contains("printing")) layout.width = 650;
      Plotly.react(element, data, layout, { displayModeBar: false });
    }
  };

  draw();
  const observer = new ResizeObserver((entries) => entries.forEach((entry) => Plotly.Plots.resize(entry.target)));
  Object.keys(figures).forEach((name) => observer.observe(document.getElementById(name)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", () => { root.classList.add("printing"); draw(); });
  addEventListener("afterprint", () => { root.classList.remove("printing"); draw(); });
})();
