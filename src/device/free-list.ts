/** The free blocks of an arena, ordered by size: a treap, so that insert, remove and best fit take O(log n). */

/** A run of bytes that is free, or was until it was handed out. */
export interface FreeBlock {
  readonly offset: number;
  readonly size: number;
}

interface Node<B extends FreeBlock> {
  readonly block: B;
  readonly priority: number;
  left: Node<B> | undefined;
  right: Node<B> | undefined;
}

type Tree<B extends FreeBlock> = Node<B> | undefined;

function compare(a: FreeBlock, b: FreeBlock): number {
  return a.size - b.size || a.offset - b.offset;
}

/** Nodes smaller than `key`, and the rest. */
function split<B extends FreeBlock>(tree: Tree<B>, key: FreeBlock): [smaller: Tree<B>, rest: Tree<B>] {
  if (!tree) return [undefined, undefined];
  if (compare(tree.block, key) < 0) {
    const [smaller, rest] = split(tree.right, key);
    tree.right = smaller;
    return [tree, rest];
  }
  const [smaller, rest] = split(tree.left, key);
  tree.left = rest;
  return [smaller, tree];
}

function merge<B extends FreeBlock>(smaller: Tree<B>, larger: Tree<B>): Tree<B> {
  if (!smaller) return larger;
  if (!larger) return smaller;
  if (smaller.priority > larger.priority) {
    smaller.right = merge(smaller.right, larger);
    return smaller;
  }
  larger.left = merge(smaller, larger.left);
  return larger;
}

export class FreeList<B extends FreeBlock> {
  #root: Tree<B>;
  #seed = 0x9e3779b9;

  insert(block: B): void {
    const [smaller, larger] = split(this.#root, block);
    const node = { block, priority: this.#random(), left: undefined, right: undefined };
    this.#root = merge(merge(smaller, node), larger);
  }

  /** False where the block is not in the list. */
  remove(block: B): boolean {
    const [smaller, rest] = split(this.#root, block);
    const [found, larger] = split(rest, { size: block.size, offset: block.offset + 1 });
    this.#root = merge(smaller, larger);
    return found !== undefined;
  }

  /** The smallest block of at least `size`, the lowest of those equal. */
  bestFit(size: number): B | undefined {
    let best: B | undefined;
    for (let node = this.#root; node; ) {
      if (node.block.size >= size) {
        best = node.block;
        node = node.left;
      } else {
        node = node.right;
      }
    }
    return best;
  }

  get largest(): B | undefined {
    let node = this.#root;
    while (node?.right) node = node.right;
    return node?.block;
  }

  // Treaps need priorities without a pattern, not secrets: xorshift32, the same in every run.
  #random(): number {
    let x = this.#seed;
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    this.#seed = x;
    return x;
  }
}
