// Command bench measures what erofsd promises, each figure beside a reference from
// the same run: a native EROFS image of the same tree, a raw transfer through the
// same link, a plain client or server. It prints a table and writes it as JSON.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/erofsd/erofsd/kernel-tests/debian"
	"github.com/erofsd/erofsd/kernel-tests/harness"
	"github.com/erofsd/erofsd/kernel-tests/rootfs"
)

// cases are in the order in which they run; each gives one row or more.
var cases = []struct {
	name    string
	measure func(context.Context, *bench) error
}{
	{"convert", convert},
	{"cold", cold},
	{"verification", verification},
	{"numpy", numpy},
	{"link", wholeTree},
	{"warm", warm},
	{"page-cold", pageCold},
	{"mounts", mounts},
	{"images", images},
	{"demand", demand},
	{"network-cpu", networkCPU},
	{"api", apiCalls},
	{"bind", binds},
	{"life", life},
	{"pull", pull},
}

func main() {
	if os.Args[0] == plainName {
		fmt.Fprintln(os.Stderr, "bench:", servePlain(os.Args[1]))
		os.Exit(1)
	}
	harness.Init()
	bin := flag.String("bin", "bin", "`directory` of erofsd and erofsctl")
	out := flag.String("out", "build/bench.json", "`file` for the figures")
	repeat := flag.Int("repeat", 5, "`number` of runs of each measurement; the median counts")
	pattern := flag.String("run", ".", "run only the cases that match `regexp`: convert, cold, verification, numpy, link, warm, page-cold, mounts, images, demand, network-cpu, api, bind, life, pull")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, *bin, *out, *repeat, *pattern); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func step(line string) { fmt.Fprintln(os.Stderr, "-", line) }

func run(ctx context.Context, bin, out string, repeat int, pattern string) (err error) {
	selected, err := regexp.Compile(pattern)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("mounting needs root: run it as root")
	}
	if repeat < 1 {
		return errors.New("-repeat must be at least 1")
	}
	if err := debian.Ensure(ctx, step, debian.Mmdebstrap, debian.MkfsErofs, debian.Tar); err != nil {
		return err
	}
	b, err := setup(ctx, bin, repeat)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	header()
	for _, c := range cases {
		if !selected.MatchString(c.name) {
			continue
		}
		if measureErr := c.measure(ctx, b); measureErr != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", c.name, measureErr))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	verdict(b.rows)
	return errors.Join(err, write(out, b.rows))
}

// verdict says how many figures are within their limits. One that is over does not
// make the run fail: the machine may have been busy.
func verdict(rows []row) {
	limited, over := 0, 0
	for _, r := range rows {
		if r.Limit != 0 {
			limited++
		}
		if r.over() {
			over++
		}
	}
	fmt.Printf("\n%d of %d figures are within their limits\n", limited-over, limited)
}

// setup makes what all cases need: the root file system, unpacked and as a native
// image, which stay in the cache, and the lazy image in a directory and in a registry.
func setup(ctx context.Context, bin string, repeat int) (b *bench, err error) {
	base, err := rootfs.Build(ctx, step)
	if err != nil {
		return nil, err
	}
	tree, err := base.Tree(ctx)
	if err != nil {
		return nil, err
	}
	b = &bench{bin: bin, repeat: repeat, tar: base.Tar, native: filepath.Join(filepath.Dir(base.Tar), "native.erofs")}
	if _, err := os.Stat(b.native); err != nil {
		if err := harness.Native(ctx, tree, b.native); err != nil {
			return nil, err
		}
	}
	if b.registry, b.image, err = harness.Publish(ctx, bin, base.Tar, step); err != nil {
		return nil, err
	}
	if b.scratch, err = os.MkdirTemp(rootfs.CacheDir(), "bench-run-"); err != nil {
		return nil, errors.Join(err, b.registry.Close())
	}
	b.local = filepath.Join(b.scratch, "local")
	if err := b.convertTo(ctx, b.local); err != nil {
		return nil, errors.Join(err, b.close())
	}
	return b, nil
}

// header says what the figures are of.
func header() {
	load, _ := os.ReadFile("/proc/loadavg")
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	now, _, _ := strings.Cut(string(load), " ")
	fmt.Printf("Linux %s, load average %s\n", strings.TrimSpace(string(kernel)), now)
	if now > "0.5" {
		fmt.Println("other work runs on this machine: times are worth little")
	}
	fmt.Printf("\n%-44s %10s %-6s %10s %7s %8s\n", "", "value", "", "reference", "ratio", "limit")
}

// row is one figure.
type row struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	// Reference is the figure of the same unit that it is compared with.
	Reference   float64 `json:"reference,omitempty"`
	ReferenceIs string  `json:"reference_is,omitempty"`
	Ratio       float64 `json:"ratio,omitempty"` // value / reference
	// Limit is the most that LimitOn, the "ratio" or the "value", may be; with AtLeast
	// the least.
	Limit   float64 `json:"limit,omitempty"`
	LimitOn string  `json:"limit_on,omitempty"`
	AtLeast bool    `json:"limit_is_least,omitempty"`
}

func (r row) over() bool {
	actual := r.Value
	if r.LimitOn == "ratio" {
		actual = r.Ratio
	}
	if r.AtLeast {
		return actual < r.Limit
	}
	return r.Limit != 0 && actual > r.Limit
}

func (r row) print() {
	reference, ratio, verdict := "", "", ""
	if r.Reference != 0 {
		reference, ratio = fmt.Sprintf("%.3f", r.Reference), fmt.Sprintf("%.2f", r.Ratio)
	}
	if r.Limit != 0 {
		verdict = fmt.Sprintf("%8.2f ok", r.Limit)
		if r.over() {
			verdict = fmt.Sprintf("%8.2f OVER", r.Limit)
		}
	}
	if r.ReferenceIs != "" {
		verdict = fmt.Sprintf("%-14s %s", verdict, r.ReferenceIs)
	}
	fmt.Printf("%-44s %10.3f %-6s %10s %7s %s\n", r.Name, r.Value, r.Unit, reference, ratio, verdict)
}

func write(name string, rows []row) error {
	text, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, append(text, '\n'), 0o644)
}
