// Markdown as language models write it, as ranges of the text: nothing is taken out or changed, and nothing becomes HTML or a link.
//
//   blocksOf(text) = [{ kind, level, start, end, pieces: [{ start, end, style }] }]
//
// `kind` is "text", "heading", "item", "quote" or "code"; `style` is "mark" for what only marks ("**", "```"), else "strong", "em",
// "code", a pair of them, or "". Blocks and pieces cover the whole text, so that an answer's tokens can be laid into them.

const FENCE = /^ *(`{3,}|~{3,})/;
const HEADING = /^ {0,3}#{1,6} +/;
const ITEM = /^( *)(?:([-*+])|\d{1,9}[.)]) +(?=\S)/;
const QUOTE = /^ {0,3}> ?/;
const ROW = /^ {0,3}\|.*\|\s*$/; // of a table, which is shown as it is written
// on one line, and not inside a word: snake_case and 2*x*y stay as they are
const INLINE = /\\[!-/:-@[-`{-~]|(`+)([^\n]{1,1000}?)(?<!`)\1(?!`)|(?<![\w*_])(\*{1,3}|__?)(?=[^\s*_])([^\n]{1,1000}?)(?<=\S)\3(?![\w*_])/g;

export const blocksOf = (text) => {
  const blocks = [];
  let start = 0;
  let fence = null;
  for (const line of text.match(/[^\n]*\n|[^\n]+$/g) ?? []) {
    const end = start + line.length;
    const last = blocks.at(-1);
    const mark = line.match(FENCE)?.[1];
    if (fence) {
      const closes = mark?.startsWith(fence) && line.trim() === mark;
      last.pieces.push({ start, end, style: closes ? "mark" : "" });
      last.end = end;
      last.done = closes;
      if (closes) fence = null;
    } else if (mark) {
      fence = mark;
      blocks.push({ kind: "code", level: 0, start, end, pieces: [{ start, end, style: "mark" }] });
    } else if (line.trim() === "" && last) {
      last.end = end;
      last.pieces.push({ start, end, style: "mark" });
      last.done = true;
    } else addLine(blocks, line, start, end);
    start = end;
  }
  for (const block of blocks) if (block.kind !== "code") block.pieces = block.pieces.flatMap((piece) => inline(text, piece));
  return blocks;
};

const addLine = (blocks, line, start, end) => {
  const last = blocks.at(-1);
  const item = line.match(ITEM);
  const [kind, prefix] = line.match(HEADING)
    ? ["heading", line.match(HEADING)[0]]
    : item
      ? ["item", item[2] ? item[0] : ""]
      : line.match(QUOTE)
        ? ["quote", line.match(QUOTE)[0]]
        : ROW.test(line)
          ? ["code", ""]
          : ["text", ""];
  const open = last && !last.done;
  const joins = open && (kind === "text" ? last.kind === "text" || last.kind === "item" : (kind === "quote" || kind === "code") && last.kind === kind);
  const block = joins ? last : { kind, level: item ? Math.min(Math.floor(item[1].length / 2), 6) : 0, start, end, pieces: [] };
  if (!joins) blocks.push(block);
  if (item?.[2]) block.bullet = true;
  if (kind === "heading") block.done = true;
  const from = start + prefix.length;
  if (prefix) block.pieces.push({ start, end: from, style: "mark" });
  block.pieces.push({ start: from, end, style: "" });
  block.end = end;
};

// A piece's emphasis and code; `outer` is the emphasis around it.
const inline = (text, piece, outer = "") => {
  if (piece.style === "mark") return [piece];
  const found = [];
  const add = (start, end, style) => end > start && found.push({ start, end, style });
  let at = piece.start;
  for (const match of text.slice(piece.start, piece.end).matchAll(INLINE)) {
    const [whole, ticks, , stars] = match;
    const [from, until] = [piece.start + match.index, piece.start + match.index + whole.length];
    const width = (ticks ?? stars ?? "\\").length;
    add(at, from, outer);
    add(from, from + width, "mark");
    const inner = { start: from + width, end: ticks || stars ? until - width : until, style: "" };
    const style = stars ? [outer, ["em", "strong", "strong em"][width - 1]].join(" ").trim() : outer;
    if (stars && !outer.includes(" ")) found.push(...inline(text, inner, style));
    else add(inner.start, inner.end, ticks ? `${outer} code`.trim() : style);
    add(inner.end, until, "mark");
    at = until;
  }
  add(at, piece.end, outer);
  return found;
};
