package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"sort"
	"strconv"
	"strings"
)

// A syntaxError is a document that is not one.
type syntaxError struct {
	place
	text string
}

func (e *syntaxError) Error() string {
	return Problem{Line: e.line, Column: e.column, Text: e.text}.Error()
}

// lines finds the place of an offset.
type lines []int // offsets at which lines begin

func newLines(data []byte) lines {
	l := lines{0}
	for i, c := range data {
		if c == '\n' {
			l = append(l, i+1)
		}
	}
	return l
}

func (l lines) place(off int) place {
	i := sort.SearchInts(l, off+1) - 1
	return place{i + 1, off - l[i] + 1}
}

// after is the place serde tells: the column is the number of bytes read in the line.
func (l lines) after(off int) place {
	p := l.place(off)
	p.column--
	return p
}

// parseJSON returns the document's tree. A member that is there twice is found wrong.
func parseJSON(data []byte, f *findings) (*node, error) {
	at := newLines(data)
	if len(data) > maxFile {
		return nil, &syntaxError{place{1, 0}, "the document is larger than 1 MiB"}
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, &syntaxError{at.after(len(data)), "EOF while parsing a value"}
	}
	var whole json.RawMessage
	if err := json.Unmarshal(data, &whole); err != nil {
		syntax, ok := errors.AsType[*json.SyntaxError](err)
		if !ok {
			return nil, &syntaxError{place{1, 0}, "not JSON"}
		}
		text := syntax.Error()
		if int(syntax.Offset) == len(data) && strings.HasPrefix(text, "unexpected end") {
			text = "EOF while parsing a value" // serde's words
		}
		return nil, &syntaxError{at.after(int(syntax.Offset)), text}
	}
	p := &jsonParser{data: data, dec: json.NewDecoder(bytes.NewReader(data)), lines: at, findings: f}
	p.dec.UseNumber()
	return p.value(nil)
}

// A jsonParser walks the tokens of a document that is known to be valid.
type jsonParser struct {
	data     []byte
	dec      *json.Decoder
	lines    lines
	findings *findings
}

// next is the offset of the next token.
func (p *jsonParser) next() int {
	off := int(p.dec.InputOffset())
	for off < len(p.data) && bytes.IndexByte([]byte(" \t\r\n,:"), p.data[off]) >= 0 {
		off++
	}
	return off
}

func (p *jsonParser) value(where path) (*node, error) {
	n := &node{at: p.lines.place(p.next())}
	if len(where) > maxDepth {
		return nil, &syntaxError{n.at, "values lie too deep in each other"}
	}
	token, err := p.dec.Token()
	if err != nil {
		return nil, &syntaxError{n.at, "not JSON"}
	}
	switch v := token.(type) {
	case nil:
		n.kind = kindNull
	case bool:
		n.kind, n.bool = kindBool, v
	case string:
		n.kind, n.text = kindText, v
	case json.Number:
		n.kind = kindFloat
		if n.number, err = strconv.ParseInt(v.String(), 10, 64); err == nil {
			n.kind = kindInteger
		}
	case json.Delim:
		if v == '[' {
			err = p.list(n, where)
		} else {
			err = p.object(n, where)
		}
		if err != nil {
			return nil, err
		}
	}
	n.end = p.lines.after(int(p.dec.InputOffset()))
	return n, nil
}

func (p *jsonParser) list(n *node, where path) error {
	n.kind = kindList
	for p.dec.More() {
		e, err := p.value(where.index(len(n.list)))
		if err != nil {
			return err
		}
		n.list = append(n.list, e)
	}
	return p.close(n)
}

func (p *jsonParser) object(n *node, where path) error {
	n.kind, n.fields = kindObject, map[string]*node{}
	for p.dec.More() {
		at := p.lines.place(p.next())
		token, err := p.dec.Token()
		name, ok := token.(string)
		if err != nil || !ok {
			return &syntaxError{at, "not JSON"}
		}
		member, err := p.value(where.at(name))
		if err != nil {
			return err
		}
		member.at = at
		if n.fields[name] != nil {
			p.findings.add(where.at(name), "duplicate field `%s`", shown(name))
		} else {
			n.names = append(n.names, name)
		}
		n.fields[name] = member
	}
	return p.close(n)
}

// close reads the bracket that ends n.
func (p *jsonParser) close(n *node) error {
	if _, err := p.dec.Token(); err != nil {
		return &syntaxError{n.at, "not JSON"}
	}
	return nil
}
