/**
 * Schemas of which one, or exactly one, has to hold: each together with what holds whichever is chosen. Where exactly one may, it is shown
 * that they exclude each other, or each is told not to be any of the others.
 */
import type { Budget } from './budget.ts';
import {
  type Located,
  type SchemaDocument,
  type SchemaObject,
  unsupportedKeyword,
} from './schema-document.ts';
import { type Alternatives, type Facts, factsOf, propertyOf, typesOverlap } from './schema-facts.ts';
import type { SchemaIdentities } from './schema-identity.ts';
import { negation } from './schema-negation.ts';
import { SchemaRests } from './schema-rest.ts';
import { satisfiesAll, typeOf, type Verdict } from './schema-values.ts';

/** Levels of schemas below two alternatives that are compared to show that they exclude each other. */
const MOST_COMPARED = 4;
/** Of two alternatives, beside what is looked at in them. */
const STEPS_PER_PAIR = 3;

interface KnownFacts {
  readonly ofWritten: Facts;
  readonly ofValid: Facts;
}

export class SchemaAlternatives {
  readonly #document: SchemaDocument;
  readonly #budget: Budget;
  readonly #rests: SchemaRests;
  readonly #nots = new Map<unknown, SchemaObject>();
  readonly #facts = new WeakMap<readonly Located[], KnownFacts>();

  constructor(document: SchemaDocument, budget: Budget, identities: SchemaIdentities) {
    this.#document = document;
    this.#budget = budget;
    this.#rests = new SchemaRests(document, budget, identities);
  }

  /** Each option together with all the rest. */
  each(alternatives: Alternatives, schemas: readonly Located[]): readonly (readonly Located[])[] {
    const { keyword, pointer, options, exactlyOne } = alternatives;
    const alone = options.map(this.#rests.without(alternatives, schemas));
    if (!exactlyOne) return alone;
    const typed = alone.map((one) => this.#typed(one));
    const canBeTurned = options.map(({ describes: [one] }) => {
      let known: boolean | undefined;
      return () => (known ??= negation({ ...one!, pointer }, this.#document, this.#budget) !== undefined);
    });
    return alone.map((_, i) => {
      const others = options.flatMap(({ describes: [other] }, j): Located[] => {
        this.#budget.work(STEPS_PER_PAIR);
        if (i === j || this.#exclude(typed[i]!, alone[j]!, MOST_COMPARED)) return [];
        if (canBeTurned[j]!()) return [{ schema: this.#notOf(other!.schema), pointer }];
        throw unsupportedKeyword(
          keyword,
          pointer,
          'has alternatives of which more than one may hold: use anyOf, or give each a required property with a const of its own',
        );
      });
      return others.length > 0 ? [...typed[i]!, ...others] : alone[i]!;
    });
  }

  /** With the types that are written for it, where only keywords tell them: so that what it is told not to be brings no others along. */
  #typed(schemas: readonly Located[]): readonly Located[] {
    const { types, values, implied, alternatives } = this.#factsOf(schemas).ofWritten;
    if (types || values || implied.size === 0 || alternatives.length > 0) return schemas;
    return [...schemas, { schema: { type: [...implied].sort() }, pointer: schemas[0]!.pointer }];
  }

  /** The same object each time, so that it is known again. */
  #notOf(schema: SchemaObject | boolean): SchemaObject {
    const known = this.#nots.get(schema) ?? { not: schema };
    this.#nots.set(schema, known);
    return known;
  }

  /** Known of a list once it has been asked for: each alternative is compared with all others. */
  #factsOf(schemas: readonly Located[]): KnownFacts {
    let known = this.#facts.get(schemas);
    if (!known) {
      const facts = factsOf(schemas, this.#document, this.#budget);
      known = { ofWritten: writtenFacts(facts), ofValid: validFacts(facts) };
      this.#facts.set(schemas, known);
    }
    return known;
  }

  /** Whether it can be shown that nothing written for `a` satisfies `b`. */
  #exclude(a: readonly Located[], b: readonly Located[], depth: number): boolean {
    if (depth === 0) return false;
    const [ofA, ofB] = [this.#factsOf(a).ofWritten, this.#factsOf(b).ofValid];
    if (ofA.impossible || ofB.impossible) return true;
    if (ofA.values) {
      const of = (schemas: readonly Located[], value: unknown) =>
        satisfiesAll(value, schemas, this.#document, this.#budget);
      const isLeftOut = (verdict: Verdict) => verdict === false || verdict === 'unlikely';
      return ofA.values.every((value) => of(b, value) === false || isLeftOut(of(a, value)));
    }
    const { types } = ofA;
    if (types && ofB.types && !typesOverlap(types, ofB.types)) return true;
    if (types && ofB.values && !ofB.values.some((value) => typesOverlap(types, new Set([typeOf(value)])))) {
      return true;
    }
    const onlyObjects = types?.size === 1 && types.has('object');
    // What one must have and the other cannot, or what both have and never alike.
    const names = onlyObjects ? new Set([...ofA.required, ...ofB.required]) : [];
    const differ = [...names].some((name) => {
      this.#budget.work(1);
      const property = (facts: Facts, written: boolean) =>
        propertyOf(name, facts, this.#document, this.#budget, written);
      const [inA, inB] = [property(ofA, true), property(ofB, false)];
      const impossible = (schemas: readonly Located[]) => this.#factsOf(schemas).ofValid.impossible;
      if (ofB.required.has(name) && impossible(inA)) return true;
      if (!ofA.required.has(name)) return false;
      return impossible(inB) || this.#exclude(inA, inB, depth - 1);
    });
    const every = (facts: Facts, all: readonly Located[], excluded: (one: readonly Located[]) => boolean) => {
      const [first] = facts.alternatives;
      if (!first) return false;
      const together = this.#rests.without(first, all);
      return first.options.every((option) => excluded(together(option)));
    };
    return (
      differ ||
      every(ofA, a, (one) => this.#exclude(one, b, depth - 1)) ||
      every(ofB, b, (one) => this.#exclude(a, one, depth - 1))
    );
  }
}

/** What holds for all that is written: where there are alternatives, those may describe other keys. */
function writtenFacts(facts: Facts): Facts {
  return facts.alternatives.length === 0 ? facts : { ...facts, closedObjects: [] };
}

/** What holds for all that is valid, of which not all is written. */
function validFacts(facts: Facts): Facts {
  const mayDescribeMore = facts.alternatives.length + facts.unsupported.length > 0 || facts.describesMore;
  return {
    ...facts,
    closedObjects: mayDescribeMore ? [] : facts.closedObjects.filter(({ exact }) => exact),
    alternatives: facts.alternatives.filter(({ complete }) => complete),
  };
}
