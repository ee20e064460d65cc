package config

import (
	"bytes"
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// parseTOML returns the document's tree. The library gives the values and checks the
// document; its parser is asked once more for the places of the keys.
func parseTOML(data []byte) (*node, error) {
	if len(data) > maxFile {
		return nil, &syntaxError{place{1, 1}, "the document is larger than 1 MiB"}
	}
	var values map[string]any
	if err := toml.Unmarshal(data, &values); err != nil {
		return nil, tomlError(err)
	}
	root, err := tomlNode(values, 0)
	if err != nil {
		return nil, err
	}
	root.at = place{1, 1}
	l := &locator{root: root, parser: &unstable.Parser{}}
	l.parser.Reset(bytes.Clone(data))
	l.run()
	return root, nil
}

// tomlError takes the place and a text that repeats no value from the library's error.
func tomlError(err error) error {
	e, ok := errors.AsType[*toml.DecodeError](err)
	if !ok {
		return &syntaxError{place{1, 1}, "not TOML"}
	}
	line, column := e.Position()
	text := strings.TrimPrefix(e.Error(), "toml: ")
	if strings.Contains(text, `parsing "`) { // strconv's, with the number
		text = "not a number, or one that is too large"
	}
	return &syntaxError{place{line, column}, text}
}

func tomlNode(value any, depth int) (*node, error) {
	n := &node{}
	if depth > maxDepth {
		return nil, &syntaxError{place{1, 1}, "values lie too deep in each other"}
	}
	switch v := value.(type) {
	case bool:
		n.kind, n.bool = kindBool, v
	case string:
		n.kind, n.text = kindText, v
	case int64:
		n.kind, n.number = kindInteger, v
	case float64:
		n.kind = kindFloat
	case []any:
		n.kind = kindList
		for _, e := range v {
			child, err := tomlNode(e, depth+1)
			if err != nil {
				return nil, err
			}
			n.list = append(n.list, child)
		}
	case map[string]any:
		n.kind, n.fields = kindObject, map[string]*node{}
		for name, e := range v {
			child, err := tomlNode(e, depth+1)
			if err != nil {
				return nil, err
			}
			n.names = append(n.names, name)
			n.fields[name] = child
		}
		slices.Sort(n.names)
	default:
		n.kind = kindDate
	}
	return n, nil
}

// A locator gives the nodes of a tree the places of their keys.
type locator struct {
	root   *node
	parser *unstable.Parser
	arrays map[string]int // how many elements of an array of tables were met
}

func (l *locator) run() {
	table := l.root
	l.arrays = map[string]int{}
	for l.parser.NextExpression() {
		switch e := l.parser.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = l.header(e)
		case unstable.KeyValue:
			l.keyValue(table, e)
		}
	}
}

// header follows the key of [a.b] or [[a.b]] to the table it opens. Where a part is an
// array of tables, it is the element that was met last.
func (l *locator) header(e *unstable.Node) *node {
	n, met := l.root, ""
	for key := e.Key(); key.Next(); {
		n = l.member(n, key.Node())
		met += "\x00" + string(key.Node().Data)
		if n == nil || n.kind != kindList {
			continue
		}
		if e.Kind == unstable.ArrayTable && key.IsLast() {
			l.arrays[met]++
		}
		i := l.arrays[met] - 1
		if i < 0 || i >= len(n.list) {
			return nil
		}
		met += "\x00" + strconv.Itoa(i)
		at := n.at
		n = n.list[i]
		if key.IsLast() {
			n.at = l.place(key.Node())
		} else if n.at.line == 0 {
			n.at = at
		}
	}
	return n
}

func (l *locator) keyValue(table *node, e *unstable.Node) {
	n := table
	for key := e.Key(); key.Next(); {
		n = l.member(n, key.Node())
	}
	l.value(n, e.Value())
}

// value goes into arrays and inline tables.
func (l *locator) value(n *node, v *unstable.Node) {
	if n == nil || v.Kind != unstable.Array && v.Kind != unstable.InlineTable {
		return
	}
	i := 0
	for it := v.Children(); it.Next(); {
		child := it.Node()
		switch {
		case v.Kind == unstable.InlineTable && child.Kind == unstable.KeyValue:
			l.keyValue(n, child)
		case v.Kind == unstable.Array && child.Kind != unstable.Comment && i < len(n.list):
			n.list[i].at = n.at
			l.value(n.list[i], child)
			i++
		}
	}
}

// member is the member of n that key names; it notes the key's place there, the first
// time.
func (l *locator) member(n *node, key *unstable.Node) *node {
	if n == nil || n.kind != kindObject {
		return nil
	}
	m := n.fields[string(key.Data)]
	if m != nil && m.at.line == 0 {
		m.at = l.place(key)
	}
	return m
}

func (l *locator) place(key *unstable.Node) place {
	start := l.parser.Shape(key.Raw).Start
	return place{start.Line, start.Column}
}
