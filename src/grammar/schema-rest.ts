/** What several schemas say beside one of their keywords, whose alternatives are put in its place. */
import type { Budget } from './budget.ts';
import { below, type Located, located, type SchemaDocument, type SchemaObject } from './schema-document.ts';
import type { Alternatives, Option } from './schema-facts.ts';
import type { SchemaIdentities } from './schema-identity.ts';
import { ALL, CLOSED } from './schema-negation.ts';
import { isClosed } from './schema-scopes.ts';

interface Rest {
  /** As they are, or without what has been taken from them. */
  readonly schemas: readonly Located[];
  /** The keyword stands in one of them. */
  readonly holdsIt: boolean;
  /** Stand around the keyword, and forbid what nothing within them describes: so the alternatives go there. */
  readonly around: readonly {
    readonly schema: SchemaObject;
    readonly pointer: string;
    readonly rest: Rest;
  }[];
}

export class SchemaRests {
  readonly #document: SchemaDocument;
  readonly #budget: Budget;
  readonly #identities: SchemaIdentities;
  readonly #stripped = new Map<string, Located>();

  constructor(document: SchemaDocument, budget: Budget, identities: SchemaIdentities) {
    this.#document = document;
    this.#budget = budget;
    this.#identities = identities;
  }

  /** Schemas without the keyword of `alternatives`, and with all else that they say, to be put together with each of the options. */
  without(alternatives: Alternatives, schemas: readonly Located[]): (option: Option) => readonly Located[] {
    const rest = this.#without(alternatives, schemas, []);
    return (option) => [...this.#with(rest, option), ...option.demands];
  }

  #with({ schemas, holdsIt, around }: Rest, option: Option): readonly Located[] {
    this.#budget.work(around.length);
    return [
      ...schemas,
      ...around.map(({ schema, pointer, rest }) => {
        return { schema: { ...schema, [ALL]: this.#with(rest, option) }, pointer };
      }),
      ...(holdsIt ? option.describes : []),
    ];
  }

  #without(alternatives: Alternatives, from: readonly Located[], above: readonly SchemaObject[]): Rest {
    const { keyword, schema: holder, name } = alternatives;
    const schemas: Located[] = [];
    const around: { schema: SchemaObject; pointer: string; rest: Rest }[] = [];
    let isHere = false;
    const seen = new Set<unknown>(above);
    const open = [...from].reverse();
    for (let one = open.pop(); one; one = open.pop()) {
      const { schema, pointer } = one;
      if (typeof schema === 'boolean' || seen.has(schema)) continue;
      seen.add(schema);
      this.#budget.work(1 + Object.keys(schema).length);
      // References and allOf may hide the keyword: what they name stands beside what names them.
      const { $ref, allOf, [ALL]: parts, ...others } = schema;
      const inner = [
        ...((parts ?? []) as readonly Located[]),
        ...(Array.isArray(allOf) ? allOf.map((part, i) => located(part, below(pointer, 'allOf', i))) : []),
        ...($ref === undefined ? [] : [this.#document.resolve($ref, pointer)]),
      ];
      const holdsIt = schema === holder;
      const left: Record<string, unknown> = { ...others };
      if (holdsIt) delete left[keyword];
      if (holdsIt && name !== undefined) {
        const { [name]: _, ...otherNames } = others[keyword] as SchemaObject;
        if (Object.keys(otherNames).length > 0) left[keyword] = otherNames;
      }
      const closesKeys = CLOSED in schema || isClosed(schema, 'unevaluatedProperties');
      if (closesKeys || isClosed(schema, 'unevaluatedItems')) {
        const rest = this.#without(alternatives, inner, [...above, schema]);
        if (!holdsIt && !rest.holdsIt && rest.around.length === 0) {
          schemas.push(one);
          continue;
        }
        // The other alternatives may describe more.
        if (closesKeys) {
          delete left['unevaluatedProperties'];
          left[CLOSED] = true;
        }
        around.push({ schema: left, pointer, rest: { ...rest, holdsIt: rest.holdsIt || holdsIt } });
        continue;
      }
      isHere ||= holdsIt;
      open.push(...inner.reverse());
      if (!holdsIt && inner.length === 0) schemas.push(one);
      else if (Object.keys(left).length > 0) {
        schemas.push(this.#strippedOf(one, left, holdsIt ? `${keyword} ${name ?? ''}` : ''));
      }
    }
    return { schemas, holdsIt: isHere, around };
  }

  /** The same object each time, so that it is known again. */
  #strippedOf({ schema, pointer }: Located, others: SchemaObject, without: string): Located {
    const key = `${this.#identities.of(schema)} ${without}`;
    const known = this.#stripped.get(key) ?? { schema: others, pointer };
    this.#stripped.set(key, known);
    return known;
  }
}
