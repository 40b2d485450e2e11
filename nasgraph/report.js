"use strict";
// Draws the figures of a report from the JSON in the page.
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { responsive: true, displaylogo: false, displayModeBar: false };

  // Two of several objectives: each trace and each reference gets the columns that were picked.
  function pair(figure, x, y) {
    const data = figure.data.map((trace) => Object.assign({}, trace, { x: trace.columns[x], y: trace.columns[y] }));
    const layout = Object.assign({}, figure.layout, {
      xaxis: figure.axes[x], yaxis: figure.axes[y], shapes: [], annotations: [],
    });
    const ink = "#5a6674";
    const dotted = { color: ink, width: 1.3, dash: "dot" };
    const spot = (axis, value) => (axis.type === "log" ? Math.log10(value) : value);
    const usable = (axis, value) => value !== undefined && (axis.type !== "log" || value > 0);
    for (const reference of figure.references) {
      const vx = reference.values[x], vy = reference.values[y];
      const hasX = usable(layout.xaxis, vx), hasY = usable(layout.yaxis, vy);
      const label = { text: reference.name, showarrow: false, font: { size: 12, color: ink }, bgcolor: "rgba(255,255,255,.8)" };
      if (hasX && hasY) {
        data.push({ x: [vx], y: [vy], mode: "markers", name: reference.name, hovertemplate: reference.name + "<extra></extra>",
          marker: { symbol: "star", size: 13, color: ink } });
      } else if (hasY) {
        layout.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: vy, y1: vy, line: dotted });
        layout.annotations.push(Object.assign(label, { xref: "paper", x: 0.99, xanchor: "right", y: spot(layout.yaxis, vy), yanchor: "bottom" }));
      } else if (hasX) {
        layout.shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: vx, x1: vx, line: dotted });
        layout.annotations.push(Object.assign(label, { yref: "paper", y: 0.99, yanchor: "top", x: spot(layout.xaxis, vx), xanchor: "left" }));
      }
    }
    return [data, layout];
  }

  for (const [id, figure] of Object.entries(figures)) {
    const place = document.getElementById(id);
    if (figure.width) place.style.minWidth = figure.width + "px";
    if (figure.height) place.style.height = figure.height + "px";
    if (!figure.axes) {
      Plotly.newPlot(place, figure.data, figure.layout, config);
      continue;
    }
    const picks = ["x", "y"].map((axis) => document.getElementById(id + "-" + axis));
    const draw = () => {
      const [x, y] = picks.map((pick, i) => (pick ? pick.value : figure.pair[i]));
      Plotly.react(place, ...pair(figure, x, y), config);
    };
    draw();
    picks.forEach((pick) => pick && pick.addEventListener("change", draw));
    place.on("plotly_click", (event) => {
      const anchor = event.points[0].customdata;
      if (anchor) location.hash = anchor;
    });
  }
})();
