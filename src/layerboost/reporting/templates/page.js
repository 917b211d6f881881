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

  const draw = (name) => {
    const { data, layout } = resolve(figures[name], getComputedStyle(root));
    // The paper's width is not known yet; this one fits A4 and Letter.
    if (root.classList.contains("printing")) layout.width = 650;
    // A button on each chart saves it as a PNG.
    const image = { format: "png", filename: name.replace("chart-", ""), width: 900, height: 460, scale: 2 };
    const config = { displaylogo: false, modeBarButtons: [["toImage"]], toImageButtonOptions: image };
    Plotly.react(document.getElementById(name), data, layout, config);
  };
  const drawAll = () => Object.keys(figures).forEach(draw);

  const observer = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      if (Math.abs(target._fullLayout.width - contentRect.width) > 1) Plotly.Plots.resize(target);
    }
  });

  // The page can be read before its charts stand: they are drawn one after the other, from the top.
  const waiting = Object.keys(figures);
  const drawNext = () => {
    const name = waiting.shift();
    if (!name) return;
    draw(name);
    observer.observe(document.getElementById(name));
    setTimeout(drawNext);
  };
  setTimeout(drawNext);

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { root.classList.add("printing"); drawAll(); });
  addEventListener("afterprint", () => { root.classList.remove("printing"); drawAll(); });
})();
