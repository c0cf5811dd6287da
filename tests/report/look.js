// What the browser test asks of a page; evaluated inside it.
window.look = (() => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const brush = canvas.getContext("2d", { willReadFrequently: true });
  const known = new Map();

  // Any CSS colour -> [red, green, blue, alpha], each in [0, 1].
  function rgba(css) {
    if (!known.has(css)) {
      brush.clearRect(0, 0, 1, 1);
      brush.fillStyle = css;
      brush.fillRect(0, 0, 1, 1);
      known.set(css, [...brush.getImageData(0, 0, 1, 1).data].map((each) => each / 255));
    }
    return known.get(css);
  }

  const over = (top, bottom) => [0, 1, 2].map((i) => top[i] * top[3] + bottom[i] * (1 - top[3]));
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);

  // WCAG 2.2: relative luminances, the lighter over the darker.
  function contrast(a, b) {
    const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  }

  function paint(element) {
    const style = getComputedStyle(element);
    if (!(element instanceof SVGElement) || element.tagName === "svg") return rgba(style.backgroundColor);
    if (style.fill === "none") return [0, 0, 0, 0];
    const [r, g, b, a] = rgba(style.fill);
    return [r, g, b, a * style.fillOpacity * style.opacity];
  }

  // What stands behind a text: the surfaces of its ancestors and, in a chart, the shapes drawn below it.
  function behind(element) {
    const layers = [];
    const svg = element.closest("svg");
    if (svg) {
      const box = element.getBoundingClientRect();
      const stack = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
      for (const each of stack) {
        if (each !== svg && svg.contains(each) && !each.closest("text")) layers.push(paint(each));
      }
    }
    for (let each = svg || element; each; each = each.parentElement) layers.push(paint(each));
    return layers.reverse().reduce((below, layer) => over(layer, below), [1, 1, 1]);
  }

  function* texts() {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement;
      const isShown = element.checkVisibility() && element.getClientRects().length > 0;
      if (walker.currentNode.data.trim() && isShown) yield [walker.currentNode, element];
    }
  }

  // One entry per pair of colours that occurs, with the first text in it.
  function contrasts() {
    const found = new Map();
    for (const [node, element] of texts()) {
      if (element.closest("svg")) element.scrollIntoView({ block: "center", behavior: "instant" });
      const style = getComputedStyle(element);
      const color = rgba(element.closest("svg") ? style.fill : style.color);
      const surface = behind(element);
      const key = [...color, ...surface].join();
      if (!found.has(key)) found.set(key, { text: node.data.trim(), contrast: contrast(over(color, surface), surface) });
    }
    return [...found.values()];
  }

  // Texts that leave their card, apart from what scrolls inside it.
  function outside() {
    const found = [];
    for (const [node, element] of texts()) {
      const home = element.closest(".card, .tile, main");
      if (element.closest(".scroll")) continue;
      const range = document.createRange();
      range.selectNodeContents(element.closest("svg") ? element : node);
      const [text, box] = [range.getBoundingClientRect(), home.getBoundingClientRect()];
      if (text.left < box.left - 0.5 || text.right > box.right + 0.5) found.push(node.data.trim());
    }
    return found;
  }

  // Pictures without a text for those who cannot see them.
  function unnamed() {
    const pictures = [...document.querySelectorAll("img, svg, canvas")];
    const isNamed = (each) => (each.alt || each.getAttribute("aria-label") || "").trim() !== "";
    return pictures.filter((each) => !isNamed(each)).map((each) => each.outerHTML.slice(0, 80));
  }

  const name = (element) => {
    const all = [...document.querySelectorAll("*")];
    return `${element.tagName} ${all.indexOf(element)}`;
  };

  // What the keyboard must reach: links, folds, and what is wider than it shows.
  function interactive() {
    const scrolled = [...document.querySelectorAll(".scroll")].filter((each) => each.scrollWidth > each.clientWidth);
    const shown = [...document.querySelectorAll("a, summary"), ...scrolled].filter((each) => each.checkVisibility());
    return shown.map(name);
  }

  return { contrasts, outside, unnamed, interactive, name };
})();
