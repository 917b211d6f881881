// Every chart of the page as a PNG, for `images.py`, which reads them from the document.
(async () => {
  const images = {};
  for (const element of document.querySelectorAll(".plot")) {
    while (!element.querySelector(".main-svg")) await new Promise((drawn) => setTimeout(drawn, 20));
    const layout = { ...element.layout, paper_bgcolor: "#ffffff", margin: { l: 12, r: 20, t: 84, b: 12 },
                     title: { text: element.getAttribute("aria-label"), x: 0.01, y: 0.98, yanchor: "top" } };
    // What the legend would switch on is not there to be switched on in a picture.
    const data = element.data.filter((trace) => trace.visible !== "legendonly");
    const figure = { data, layout };
    images[element.id] = await Plotly.toImage(figure, { format: "png", width: 900, height: 460, scale: 2 });
  }
  const holder = document.createElement("pre");
  holder.id = "images";
  holder.textContent = JSON.stringify(images);
  document.body.append(holder);
})();
