// What is wrong with the page as it is drawn, a line each: text that is wider than the window or its box, labels of a figure that
// lie on one another or outside, text of too little contrast.
(() => {
  const wrong = new Set();
  const say = (what, node) => wrong.add(`${what}: ${node.textContent.trim().replace(/\s+/g, " ").slice(0, 60)}`);
  const isShown = (node) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && node.getClientRects().length > 0;
  const ownText = (node) => [...node.childNodes].filter((child) => child.nodeType === 3 && child.data.trim());
  if (document.documentElement.scrollWidth > innerWidth) wrong.add(`the page is ${document.documentElement.scrollWidth} px wide in ${innerWidth}`);

  const scrolls = (node) => ["auto", "scroll"].includes(getComputedStyle(node).overflowX);
  const isUnseen = (node) => node.closest(".unseen, .skip, noscript, script, style, title");
  for (const node of document.body.querySelectorAll("*")) {
    if (isUnseen(node) || node.closest("svg") || !isShown(node) || !ownText(node).length) continue;
    const box = node.getBoundingClientRect();
    const scroller = node.parentElement.closest("*") && [...ancestors(node)].find(scrolls);
    if (!scroller && (box.right > innerWidth + 1 || box.left < -1)) say("outside the window", node);
    if (scroller && scroller.tabIndex < 0 && scroller.scrollWidth > scroller.clientWidth + 1) say("scrolls but not by keyboard", node);
    const style = getComputedStyle(node);
    const isCut = node.scrollWidth > node.clientWidth + 1 && style.display !== "inline";
    if (isCut && style.overflowX === "hidden" && !node.title) say("cut without its whole text in a title", node);
    if (isCut && style.overflowX === "visible") say("wider than its box", node);
    const ratio = contrast(style.color, backgroundOf(node));
    const isLarge = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 600);
    if (!node.disabled && ratio < (isLarge ? 3 : 4.5)) say(`contrast ${ratio.toFixed(1)}`, node);
  }

  for (const root of document.querySelectorAll(".js-plotly-plot, .chart svg")) {
    const frame = root.getBoundingClientRect();
    const texts = [...root.querySelectorAll("text")].filter((text) => text.textContent.trim() && isShown(text) && !text.closest(".hoverlayer, .modebar, .unseen"));
    const boxes = texts.map((text) => text.getBoundingClientRect());
    for (const [place, text] of texts.entries()) {
      const own = boxes[place];
      if (own.left < frame.left - 2 || own.right > frame.right + 2) say("a label outside its figure", text);
      const ratio = contrast(getComputedStyle(text).fill, backgroundOf(root));
      if (ratio < 4.5) say(`contrast ${ratio.toFixed(1)} of a label`, text);
      for (const [other, rect] of boxes.slice(place + 1).entries()) {
        const width = Math.min(own.right, rect.right) - Math.max(own.left, rect.left);
        const height = Math.min(own.bottom, rect.bottom) - Math.max(own.top, rect.top);
        if (width > 3 && height > 4) say(`a label on “${texts[place + 1 + other].textContent}”`, text);
      }
    }
  }
  return [...wrong];

  function* ancestors(node) {
    for (let parent = node.parentElement; parent && parent !== document.body; parent = parent.parentElement) yield parent;
  }
  // colours as the browser computes them, color-mix() and light-dark() included
  function channels(colour) {
    const canvas = (channels.canvas ??= new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true }));
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  }
  function backgroundOf(node) {
    const layers = [];
    for (const own of [node, ...ancestors(node), document.body]) layers.push(channels(getComputedStyle(own).backgroundColor));
    return layers.reverse().reduce((under, [r, g, b, a]) => [r, g, b].map((value, at) => a * value + (1 - a) * under[at]), [255, 255, 255]);
  }
  function contrast(colour, ground) {
    const [r, g, b, a] = channels(colour);
    const luminance = (rgb) => {
      const [x, y, z] = rgb.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
      return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const [one, two] = [luminance([r, g, b].map((value, at) => a * value + (1 - a) * ground[at])), luminance(ground)];
    return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  }
})();
