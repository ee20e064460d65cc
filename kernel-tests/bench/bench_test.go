package main

import "testing"

func TestQuantile(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(100 - i)
	}
	for _, c := range []struct {
		values []float64
		q      float64
		want   float64
	}{
		{[]float64{3}, 0.5, 3},
		{[]float64{9, 1, 5}, 0.5, 5},
		{[]float64{4, 1, 3, 2}, 0.5, 2.5},
		{hundred, 0.99, 100},
		{hundred, 0.5, 50.5},
	} {
		if got := quantile(c.values, c.q); got != c.want {
			t.Errorf("quantile %v of %v is %v, want %v", c.q, c.values, got, c.want)
		}
	}
}

func TestOver(t *testing.T) {
	for _, c := range []struct {
		row  row
		over bool
	}{
		{row{Value: 100}, false},
		{row{Value: 2, Limit: 2, LimitOn: "value"}, false},
		{row{Value: 2.1, Limit: 2, LimitOn: "value"}, true},
		{row{Value: 2.1, Ratio: 1.04, Limit: 1.05, LimitOn: "ratio"}, false},
		{row{Value: 0.1, Ratio: 1.06, Limit: 1.05, LimitOn: "ratio"}, true},
	} {
		if got := c.row.over(); got != c.over {
			t.Errorf("over is %v for %+v", got, c.row)
		}
	}
}
