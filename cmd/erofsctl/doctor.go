package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v3"
)

// A level says how bad a finding is.
type level string

// The levels of findings.
const (
	fine    level = "ok"
	note    level = "note"    // something that need not be there is not
	warning level = "warning" // it works, but not always or not as well
	failure level = "error"   // it does not work
)

// A finding is what doctor sees, and what to do about it.
type finding struct {
	Check string `json:"check"`
	Level level  `json:"level"`
	Found string `json:"found"`
	Do    string `json:"do,omitempty"`
}

// A doctor looks at a machine. It changes nothing that stays.
type doctor struct {
	host        string // root directory of the machine, / but in tests
	root        string // of erofsd
	daemon      string // sockets
	snapshotter string
	system      string
	containerd  string // its configuration
	registries  []string
	client      *http.Client
	now         func() time.Time
	transports  []transport
	synced      func() (bool, error)                                      // whether the clock is kept right
	run         func(ctx context.Context, args ...string) (string, error) // a program of the machine
	findings    []finding
}

// add notes a finding.
func (d *doctor) add(l level, check, do, found string, args ...any) {
	d.findings = append(d.findings, finding{Check: check, Level: l, Found: fmt.Sprintf(found, args...), Do: do})
}

// at is where a path of the machine is.
func (d *doctor) at(path string) string { return filepath.Join(d.host, path) }

// defaultAddress is where the snapshotter listens for containerd unless it is told otherwise.
const defaultAddress = "/run/containerd-erofsd/containerd-erofsd-grpc.sock"

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "say what this machine can do, what is wrong in its configuration, and what to do about it; status 1 if something does not work",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "root", Value: "/var/lib/erofsd", Usage: "`DIR` of erofsd, where the cache is or would be"},
			&cli.StringFlag{Name: "containerd-config", Value: "/etc/containerd/config.toml", Usage: "`FILE` of containerd's configuration"},
			&cli.StringFlag{Name: "address", Value: defaultAddress, Usage: "`SOCKET` of the snapshotter for containerd"},
			&cli.StringSliceFlag{Name: "registry", Usage: "ask the registry at `HOST`, host:port or http://host:port, whether it answers"},
			&cli.BoolFlag{Name: "json", Usage: "print JSON"},
		},
		Action: func(ctx context.Context, c *cli.Command) error {
			d := &doctor{
				host: "/", root: c.String("root"), daemon: c.String("daemon"), snapshotter: c.String("address"), system: c.String("snapshotter"),
				containerd: c.String("containerd-config"), registries: c.StringSlice("registry"),
				client: &http.Client{Timeout: registryTime}, now: time.Now, transports: transports(), synced: clockSynced, run: runProgram,
			}
			defer d.client.CloseIdleConnections()
			if err := d.examine(ctx); err != nil {
				return err
			}
			if err := d.report(c.Root().Writer, c.Bool("json")); err != nil {
				return err
			}
			if d.worst() == failure {
				return cli.Exit("", 1)
			}
			return nil
		},
	}
}

// examine makes all findings.
func (d *doctor) examine(ctx context.Context) error {
	if err := d.examineKernel(); err != nil {
		return err
	}
	d.examineDisk()
	d.examineLimits()
	d.examineClock()
	d.examineUnits()
	d.examineSockets(ctx)
	d.examineContainerd(ctx)
	for _, r := range d.registries {
		d.examineRegistry(ctx, r)
	}
	return ctx.Err()
}

// worst is the level that decides the exit status.
func (d *doctor) worst() level {
	worst := fine
	for _, f := range d.findings {
		if f.Level == failure || f.Level == warning && worst == fine {
			worst = f.Level
		}
	}
	return worst
}

// report prints the findings.
func (d *doctor) report(w io.Writer, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(struct {
			Worst    level     `json:"worst"`
			Findings []finding `json:"findings"`
		}{d.worst(), d.findings})
	}
	for _, f := range d.findings {
		if _, err := fmt.Fprintf(w, "%-8s %-12s %s\n", f.Level, f.Check, strings.ReplaceAll(f.Found, "\n", "; ")); err != nil {
			return err
		}
		for line := range strings.Lines(f.Do) {
			if _, err := fmt.Fprintf(w, "%-8s %-12s > %s\n", "", "", strings.TrimRight(line, "\n")); err != nil {
				return err
			}
		}
	}
	return nil
}

// programTime bounds the programs that doctor runs.
const programTime = 10 * time.Second

// runProgram runs a program and returns what it prints.
func runProgram(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, programTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).Output()
	return strings.TrimSpace(string(out)), err
}

// scratch makes a directory for probes on the file system of root. While root
// does not exist that is where its parent lies: a diagnosis leaves nothing behind.
func scratch(root string) (dir string, remove func(), err error) {
	if root, err = filepath.Abs(root); err != nil {
		return "", nil, fmt.Errorf("doctor: %w", err)
	}
	dir, err = os.MkdirTemp(existing(root), "erofsd-doctor-*")
	if err != nil {
		return "", nil, fmt.Errorf("doctor: %w (choose another --root)", err)
	}
	return dir, func() { os.RemoveAll(dir) }, nil
}

// existing is path, or the nearest directory above it that there is.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			return path
		}
		path = filepath.Dir(path)
	}
}
