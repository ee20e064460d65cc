package config

import (
	"strconv"
	"strings"
)

// maxFile bounds every document that is parsed; nydusd's own bound.
const maxFile = 1 << 20

// maxDepth bounds how deep values lie in each other.
const maxDepth = 64

// kind is the type of a value. Its text is serde's word, which clients of nydusd know.
type kind string

const (
	kindNull    kind = "null"
	kindBool    kind = "boolean"
	kindInteger kind = "integer"
	kindFloat   kind = "floating point"
	kindText    kind = "string"
	kindList    kind = "sequence"
	kindObject  kind = "map"
	kindDate    kind = "date"
)

// place is a line and a column, both from 1; zero when unknown.
type place struct{ line, column int }

// A node is a value of a document and where it stands.
type node struct {
	kind   kind
	bool   bool
	number int64
	text   string
	list   []*node
	names  []string // of an object, in its order
	fields map[string]*node

	at  place // of its key, or its own beginning
	end place // behind its last byte; JSON only
}

// field returns a member that is there and is not null, else nil.
func (n *node) field(name string) *node {
	if n == nil || n.kind != kindObject {
		return nil
	}
	if f := n.fields[name]; f != nil && f.kind != kindNull {
		return f
	}
	return nil
}

// path says where something stands in a document: keys, and "[2]" for an element.
type path []string

func (p path) at(keys ...string) path { return append(p[:len(p):len(p)], keys...) }

func (p path) index(i int) path { return p.at("[" + strconv.Itoa(i) + "]") }

func (p path) String() string {
	var b strings.Builder
	for i, key := range p {
		if i > 0 && !strings.HasPrefix(key, "[") {
			b.WriteByte('.')
		}
		b.WriteString(shown(key))
	}
	return b.String()
}

// shown makes what a document calls something fit to be shown: names are repeated, what
// is no name could be anything.
func shown(name string) string {
	strange := func(r rune) bool {
		return !(r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || strings.ContainsRune("-_.[]", r))
	}
	if len(name) > 64 || strings.ContainsFunc(name, strange) {
		return "(not a name)"
	}
	return name
}

// find returns the node at p, or the nearest one above it that is there.
func (n *node) find(p path) (found *node, exact bool) {
	for _, key := range p {
		var next *node
		if index, ok := strings.CutPrefix(key, "["); ok && n.kind == kindList {
			if i, err := strconv.Atoi(strings.TrimSuffix(index, "]")); err == nil && i >= 0 && i < len(n.list) {
				next = n.list[i]
			}
		} else {
			next = n.fields[key]
		}
		if next == nil {
			return n, false
		}
		n = next
	}
	return n, true
}
