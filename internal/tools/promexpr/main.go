// Command promexpr reads expressions of Prometheus from standard input, a JSON string each, and
// prints for each what it asks for, a JSON array of metrics with their labels. It fails when
// one is none.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
)

// A selector is a metric of an expression, and the labels by which it is selected.
type selector struct {
	Metric string   `json:"metric"`
	Labels []string `json:"labels"`
}

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "promexpr:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer) error {
	expressions, answers := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var text string
		err := expressions.Decode(&text)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		expr, err := parser.ParseExpr(text)
		if err != nil {
			return fmt.Errorf("%s: %w", text, err)
		}
		if err := answers.Encode(selectors(expr)); err != nil {
			return err
		}
	}
}

// selectors are those of an expression.
func selectors(expr parser.Expr) []selector {
	found := []selector{}
	parser.Inspect(expr, func(n parser.Node, _ []parser.Node) error {
		v, ok := n.(*parser.VectorSelector)
		if !ok {
			return nil
		}
		s := selector{Metric: v.Name, Labels: []string{}}
		for _, m := range v.LabelMatchers {
			if m.Name != labels.MetricName {
				s.Labels = append(s.Labels, m.Name)
			}
		}
		found = append(found, s)
		return nil
	})
	return found
}
