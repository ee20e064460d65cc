package config

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A Problem is one thing that is wrong in a configuration, and where. Its text holds no
// secret and no value of a key that may be one.
type Problem struct {
	File   string // "" when it has none
	Line   int    // from 1; 0: unknown
	Column int    // from 1
	Key    string // such as image.backend.registry.host; "": the whole document
	Text   string
}

func (p Problem) Error() string {
	where := p.File
	switch {
	case p.Line > 0 && p.File != "":
		where = fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
	case p.Line > 0:
		where = fmt.Sprintf("line %d, column %d", p.Line, p.Column)
	}
	parts := slices.DeleteFunc([]string{where, p.Key, p.Text}, func(s string) bool { return s == "" })
	return strings.Join(parts, ": ")
}

// maxFindings bounds how many problems of a document are told.
const maxFindings = 32

// class orders what can be wrong with a blob entry by who finds it in nydusd.
type class int

const (
	classParse   class = iota // the document's shape
	classRequest              // a configuration that cannot be
	classInvalid              // an entry that cannot be
)

// A finding is a problem whose place is not looked up yet.
type finding struct {
	path    path
	missing bool   // the key is not there, but must be
	text    string // else
	class   class
}

// findings collects what is wrong, and what may surprise.
type findings struct {
	class    class // of what is found next
	list     []finding
	warnings []finding
}

func (f *findings) add(p path, format string, args ...any) {
	f.found(finding{path: p, text: fmt.Sprintf(format, args...), class: f.class})
}

func (f *findings) missing(p path) { f.found(finding{path: p, missing: true, class: f.class}) }

// found keeps the first finding of a key: a value of the wrong type is not missing too.
func (f *findings) found(n finding) {
	same := func(o finding) bool { return slices.Equal(o.path, n.path) }
	if len(f.list) < maxFindings && !slices.ContainsFunc(f.list, same) {
		f.list = append(f.list, n)
	}
}

func (f *findings) warn(p path, text string) {
	if len(f.warnings) < maxFindings {
		f.warnings = append(f.warnings, finding{path: p, text: text})
	}
}

// problem looks up the place of one finding. root may be nil.
func (f finding) problem(root *node, file string) Problem {
	p := Problem{File: file, Key: f.path.String(), Text: f.text}
	if f.missing {
		p.Text = "missing"
	}
	if root != nil {
		n, _ := root.find(f.path)
		p.Line, p.Column = n.at.line, n.at.column
	}
	return p
}

func problems(list []finding, root *node, file string) []Problem {
	var all []Problem
	for _, f := range list {
		all = append(all, f.problem(root, file))
	}
	slices.SortStableFunc(all, func(a, b Problem) int { return cmp.Compare(a.Line, b.Line) })
	return all
}

// err is all problems joined, nil when there is none.
func (f *findings) err(root *node, file string) error {
	var errs []error
	for _, p := range problems(f.list, root, file) {
		errs = append(errs, p)
	}
	return errors.Join(errs...)
}

// warned is the text of all warnings.
func (f *findings) warned(root *node) []string {
	var texts []string
	for _, p := range problems(f.warnings, root, "") {
		texts = append(texts, p.Error())
	}
	return texts
}
