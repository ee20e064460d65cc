package keychain

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	maxSecrets   = 4096             // kept
	syncPatience = 10 * time.Second // of who asks before the secrets were listed
	retryPause   = time.Second      // after a failure; it doubles
	retryMax     = time.Minute      // up to this
)

// Secrets has the logins in Kubernetes secrets of type kubernetes.io/dockerconfigjson in some
// namespaces. Which pod wants an image is not known here: every secret counts for every pod.
type Secrets struct {
	api        *kubeAPI
	namespaces []string
	changed    chan<- struct{}
	log        *slog.Logger
	tried      chan struct{} // closed when all were listed, or could not be

	// mu guards what follows.
	mu       sync.Mutex
	secrets  map[secretName]keyring
	failures map[string]error // by namespace: why it cannot be followed now
}

type secretName struct{ namespace, name string }

// NewSecrets returns a provider that reads the secrets in namespaces ("*": all) of the
// cluster that a kubeconfig names, or with "" of that whose pod this process is. It asks
// nothing before Run. changed gets a signal when logins have changed.
func NewSecrets(config string, namespaces []string, changed chan<- struct{}, log *slog.Logger) (*Secrets, error) {
	api, err := inCluster(serviceAccount)
	if config != "" {
		api, err = fromKubeconfig(config)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to Kubernetes (kubeconfig %q): %w", config, err)
	}
	return newSecrets(api, namespaces, changed, log), nil
}

func newSecrets(api *kubeAPI, namespaces []string, changed chan<- struct{}, log *slog.Logger) *Secrets {
	return &Secrets{
		api: api, namespaces: namespaces, changed: changed, log: log,
		tried: make(chan struct{}), secrets: map[secretName]keyring{}, failures: map[string]error{},
	}
}

// Name is "secrets".
func (*Secrets) Name() string { return "secrets" }

// Run follows the secrets until ctx ends. Without the API what was read last counts.
func (s *Secrets) Run(ctx context.Context) {
	defer s.api.client.CloseIdleConnections()
	var tried, all sync.WaitGroup
	tried.Add(len(s.namespaces))
	for _, n := range s.namespaces {
		all.Go(func() { s.follow(ctx, n, sync.OnceFunc(tried.Done)) })
	}
	tried.Wait()
	close(s.tried)
	all.Wait()
}

// follow lists and watches one namespace until ctx ends. It calls tried when it has listed
// it, or could not.
func (s *Secrets) follow(ctx context.Context, namespace string, tried func()) {
	defer tried()
	pause, version := retryPause, ""
	for {
		var err error
		if version == "" {
			version, err = s.list(ctx, namespace)
		}
		s.note(ctx, namespace, err)
		tried()
		if err == nil {
			pause = retryPause
			version, err = s.api.watch(ctx, namespace, version, s.event)
		}
		if errors.Is(err, errGone) {
			version, err = "", nil
		}
		s.note(ctx, namespace, err)
		if !sleep(ctx, pause) {
			return
		}
		if err != nil {
			pause = min(2*pause, retryMax)
		}
	}
}

// note keeps why a namespace cannot be followed now; nil: it can.
func (s *Secrets) note(ctx context.Context, namespace string, err error) {
	s.mu.Lock()
	old := s.failures[namespace]
	delete(s.failures, namespace)
	if err != nil {
		s.failures[namespace] = err
	}
	s.mu.Unlock()
	if err != nil && (old == nil || old.Error() != err.Error()) && ctx.Err() == nil {
		s.log.Warn("follow Kubernetes secrets; it is tried again", "namespace", namespace, "err", err)
	}
}

// list replaces what is known of a namespace by what is there.
func (s *Secrets) list(ctx context.Context, namespace string) (version string, err error) {
	found := map[secretName]keyring{}
	version, err = s.api.list(ctx, namespace, func(o secret) {
		if ring := s.read(o); len(ring) > 0 && len(found) < maxSecrets {
			found[o.name()] = ring
		}
	})
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	for name := range s.secrets {
		if namespace == "*" || name.namespace == namespace {
			delete(s.secrets, name)
		}
	}
	for name, ring := range found {
		if len(s.secrets) < maxSecrets {
			s.secrets[name] = ring
		}
	}
	s.mu.Unlock()
	signal(s.changed)
	return version, nil
}

// event takes up what happened to a secret.
func (s *Secrets) event(kind string, o secret) {
	if kind == "BOOKMARK" {
		return
	}
	ring := s.read(o)
	s.mu.Lock()
	if _, known := s.secrets[o.name()]; kind == "DELETED" || len(ring) == 0 {
		delete(s.secrets, o.name())
	} else if known || len(s.secrets) < maxSecrets {
		s.secrets[o.name()] = ring
	}
	s.mu.Unlock()
	signal(s.changed)
}

// read returns the logins in a secret. One that is broken has none.
func (s *Secrets) read(o secret) keyring {
	if o.Type != secretType {
		return nil
	}
	ring, err := parseDockerConfig(o.Data[".dockerconfigjson"])
	if err != nil {
		s.log.Warn("a Kubernetes secret is passed over", "namespace", o.Metadata.Namespace, "name", o.Metadata.Name, "err", err)
	}
	return ring
}

func (o secret) name() secretName { return secretName{o.Metadata.Namespace, o.Metadata.Name} }

// Login returns the most specific login for an image; of equal ones that of the first
// secret by namespace and name.
func (s *Secrets) Login(ctx context.Context, image string) (Login, error) {
	patient := time.NewTimer(syncPatience)
	defer patient.Stop()
	select {
	case <-s.tried:
	case <-ctx.Done():
		return Login{}, ctx.Err()
	case <-patient.C:
		return Login{}, errors.New("kubernetes has not answered yet")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var ring keyring
	names := slices.SortedFunc(maps.Keys(s.secrets), func(a, b secretName) int {
		return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
	})
	for _, n := range names {
		if k, ok := s.secrets[n].find(complete(image)); ok {
			ring = append(ring, k)
		}
	}
	found, ok := ring.sorted().find(complete(image))
	if !ok && len(s.failures) > 0 {
		return Login{}, errors.Join(slices.Collect(maps.Values(s.failures))...)
	}
	return found.login, nil
}

// Refused does nothing: a secret that changes is seen anyway.
func (*Secrets) Refused(string) {}

// sleep returns false when ctx ends before the time is over.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
