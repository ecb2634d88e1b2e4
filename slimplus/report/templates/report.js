const figures = JSON.parse(document.getElementById("figures").textContent);
const places = [...document.querySelectorAll(".chart")];
const dark = matchMedia("(prefers-color-scheme: dark)");

// Charts are drawn in the colours of the page, or in those of paper.
function colours(paper) {
  const style = getComputedStyle(document.documentElement);
  const read = (name, printed) => (paper ? printed : style.getPropertyValue(name).trim());
  return {
    ink: read("--ink", "#16181d"),
    soft: read("--soft", "#5c6370"),
    line: read("--line", "#dfe1e5"),
    card: read("--card", "#ffffff"),
  };
}

function coloured(layout, { ink, soft, line, card }) {
  const axis = { gridcolor: line, linecolor: line, tickcolor: line };
  return {
    ...layout,
    font: { ...layout.font, color: ink, family: "system-ui, sans-serif" },
    hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink } },
    xaxis: { ...layout.xaxis, ...axis },
    yaxis: { ...layout.yaxis, ...axis },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
    autosize: true,
    dragmode: false,
  };
}

function save(format) {
  return (chart) => Plotly.downloadImage(chart, { format, filename: chart.getAttribute("aria-label"), scale: 2 });
}

const settings = {
  responsive: true,
  displaylogo: false,
  modeBarButtons: [[
    { name: "png", title: "Save as PNG", icon: Plotly.Icons.camera, click: save("png") },
    { name: "svg", title: "Save as SVG", icon: Plotly.Icons.disk, click: save("svg") },
  ]],
};

function draw(paper = false) {
  const chosen = colours(paper);
  places.forEach((place, number) => {
    const { data, layout } = figures[number];
    Plotly.react(place, data, coloured(layout, chosen), settings);
  });
}

draw();
dark.addEventListener("change", () => draw());
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  draw(true);
});
addEventListener("afterprint", () => draw());
