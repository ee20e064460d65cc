package main

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"
)

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
		{row{Value: 50, Limit: 60, LimitOn: "value", AtLeast: true}, true},
		{row{Value: 60, Limit: 60, LimitOn: "value", AtLeast: true}, false},
		{row{Value: 900, Ratio: 0.3, Limit: 0.5, LimitOn: "ratio", AtLeast: true}, true},
		{row{Value: 0.1, Ratio: 1.06, Limit: 1.05, LimitOn: "ratio"}, true},
	} {
		if got := c.row.over(); got != c.over {
			t.Errorf("over is %v for %+v", got, c.row)
		}
	}
}

func TestInParallel(t *testing.T) {
	var calls [50]atomic.Int64
	times, err := inParallel(len(calls), 7, func(i int) (time.Duration, error) {
		calls[i].Add(1)
		return time.Duration(i) * time.Millisecond, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range calls {
		if n := calls[i].Load(); n != 1 || times[i] != float64(i) {
			t.Errorf("%d was done %d times and took %v ms", i, n, times[i])
		}
	}
	stop := errors.New("stop")
	if _, err := inParallel(3, 1, func(i int) (time.Duration, error) {
		if i > 1 {
			t.Error("it went on after an error")
		}
		return 0, map[int]error{1: stop}[i]
	}); !errors.Is(err, stop) {
		t.Errorf("the error is %v", err)
	}
}
