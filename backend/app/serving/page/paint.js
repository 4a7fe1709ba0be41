// 在 canvas 上画方阵：深浅取自样式表的颜色，所以明暗一换就跟着换。

/** @typedef {{lut: Uint8ClampedArray, hidden: number[], later: number[], mark: string}} Shades */

/** @param {string} name @returns {number[]} 样式表里 #rrggbb 的三个数 */
function colour(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => Number.parseInt(text.slice(at, at + 2), 16));
}

/** 0 到 255 的深浅 -> 颜色；从纸经过淡的到深的。 @returns {Shades} */
export function shades() {
  const stops = [colour("--card"), colour("--a2"), colour("--strong")];
  const lut = new Uint8ClampedArray(256 * 3);
  for (let i = 0; i < 256; i += 1) {
    const at = (i / 255) * 2;
    const low = stops[Math.min(1, Math.floor(at))] ?? [];
    const high = stops[Math.min(2, Math.floor(at) + 1)] ?? [];
    const part = at - Math.min(1, Math.floor(at));
    for (let c = 0; c < 3; c += 1) lut[3 * i + c] = (low[c] ?? 0) * (1 - part) + (high[c] ?? 0) * part;
  }
  const mark = getComputedStyle(document.documentElement).getPropertyValue("--after").trim();
  return { lut, hidden: colour("--hidden"), later: colour("--paper"), mark };
}

/**
 * size x size 格，每格 each 像素。value：0 到 255，-1 = 图样不许看（斜纹），-2 = 在后面（纸的颜色）。
 * @param {HTMLCanvasElement} canvas @param {number} size @param {number} each
 * @param {(row: number, column: number) => number} value @param {Shades} colours
 * @param {{row: number, column: number}} [at] 框出来的一行与一格
 */
export function paint(canvas, size, each, value, colours, at) {
  canvas.width = canvas.height = size * each;
  const context = canvas.getContext("2d");
  if (!context) throw new Error("this browser draws no canvas");
  const image = context.createImageData(size * each, size * each);
  for (let y = 0; y < size * each; y += 1) {
    for (let x = 0; x < size * each; x += 1) {
      const found = value(Math.floor(y / each), Math.floor(x / each));
      const striped = each < 4 || (x + y) % 4 < 2;
      const rgb = found === -2 || (found === -1 && !striped) ? colours.later : colours.hidden;
      for (let c = 0; c < 3; c += 1) {
        image.data[4 * (y * size * each + x) + c] = found >= 0 ? colours.lut[3 * found + c] ?? 0 : rgb[c] ?? 0;
      }
      image.data[4 * (y * size * each + x) + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
  if (!at) return;
  context.strokeStyle = colours.mark;
  context.lineWidth = Math.max(1, Math.min(2, each / 3));
  context.strokeRect(0.5, at.row * each + 0.5, (at.row + 1) * each - 1, each - 1);
  if (at.column <= at.row) context.strokeRect(at.column * each + 0.5, at.row * each + 0.5, each - 1, each - 1);
}
