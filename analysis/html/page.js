// Draws the figures in the page's colours, and again when these change. Nothing is fetched and nothing is stored.
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  const medium = matchMedia("(max-width: 56rem)");
  const SCREENS = ["wide", "medium", "narrow"];
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;

  // var(--name) is resolved by the browser itself, which knows light-dark()
  const colour = (text) => {
    probe.style.color = text;
    return getComputedStyle(probe).color;
  };
  // only under keys that hold colours: a role may be called "var(--ink)"
  const resolved = (value, key) => {
    if (typeof value === "string") return /color/i.test(key) && value.startsWith("var(") ? colour(value) : value;
    if (Array.isArray(value)) return value.map((item) => resolved(item, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, resolved(item, name)]));
  };

  // an allowed list: plotly's own buttons include one that shares the chart with a server
  const config = {
    responsive: true,
    displaylogo: false,
    scrollZoom: false, // the wheel scrolls the page
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    toImageButtonOptions: { format: "svg" },
  };
  const buttons = {
    flat: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    deep: [["toImage", "resetCameraDefault3d"]],
  };
  const canvas = document.createElement("canvas");
  const hasWebGL = Boolean(canvas.getContext("webgl2") || canvas.getContext("webgl"));

  const draw = () => {
    const screen = narrow.matches ? "narrow" : medium.matches ? "medium" : "wide"; // labels are placed for three widths
    for (const box of document.querySelectorAll("[data-figure]")) {
      const figure = resolved(figures[box.dataset.figure], "");
      if (figure.layout.scene && !hasWebGL) {
        box.textContent = "This browser does not draw in three dimensions (no WebGL).";
        box.classList.add("absent");
        continue;
      }
      const scene = figure.layout.scene;
      if (scene && narrow.matches) for (const side in scene.camera.eye) scene.camera.eye[side] *= 1.75; // step back
      const data = figure.data.filter((trace) => !SCREENS.includes(trace.meta) || trace.meta === screen);
      Plotly.react(box, data, figure.layout, { ...config, modeBarButtons: scene ? buttons.deep : buttons.flat });
    }
  };

  const button = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const name = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };
  const paint = () => {
    name();
    draw();
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    paint();
  });
  dark.addEventListener("change", paint);
  for (const width of [narrow, medium]) width.addEventListener("change", draw);
  paint();

  // a figure with two kinds of axes: the page changes over and back
  for (const change of document.querySelectorAll("[data-switch]")) {
    const layout = figures[change.dataset.switch].layout;
    change.hidden = false;
    change.addEventListener("click", () => {
      for (const [axis, other] of Object.entries(layout.meta)) {
        layout.meta[axis] = Object.fromEntries(Object.keys(other).map((name) => [name, layout[axis][name]]));
        Object.assign(layout[axis], other);
      }
      const pressed = change.getAttribute("aria-pressed") !== "true";
      change.setAttribute("aria-pressed", pressed);
      layout.uirevision = `keep ${pressed}`; // a zoom on one kind means nothing on the other
      draw();
    });
  }

  const find = document.getElementById("find");
  if (find) find.closest("p").hidden = false;
  find?.addEventListener("input", () => {
    const wanted = find.value.trim().toLowerCase();
    for (const row of document.querySelectorAll(".ranking tbody tr")) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    }
  });

  const copy = document.getElementById("copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.querySelector(".command code").textContent);
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    });
  }
})();
