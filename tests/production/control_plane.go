// The control plane of Kubernetes in one binary, with kubectl and the probes of the kubelet: kube PART FLAGS.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	"k8s.io/kubernetes/pkg/probe"
	"k8s.io/kubernetes/pkg/probe/grpc"
	"k8s.io/kubernetes/pkg/probe/http"
	"k8s.io/kubernetes/pkg/probe/tcp"
)

// question is a line of the prober's input.
type question struct {
	ID      int
	Kind    string // grpc, http or tcp
	Host    string
	Port    int
	Service string  // of grpc
	Scheme  string  // of http
	Path    string  // of http
	Seconds float64 // the deadline
}

// answer is a line of the prober's output.
type answer struct {
	ID      int
	Success bool
	Said    string
}

func ask(asked question) (probe.Result, string, error) {
	deadline := time.Duration(asked.Seconds * float64(time.Second))
	switch asked.Kind {
	case "grpc":
		return grpc.New().Probe(asked.Host, asked.Service, asked.Port, deadline)
	case "tcp":
		return tcp.New().Probe(asked.Host, asked.Port, deadline)
	}
	host := net.JoinHostPort(asked.Host, strconv.Itoa(asked.Port))
	request, err := http.NewProbeRequest(&url.URL{Scheme: asked.Scheme, Host: host, Path: asked.Path}, nil)
	if err != nil {
		return probe.Unknown, "", err
	}
	return http.New(false).Probe(request, deadline)
}

// prober answers each question of its input as the kubelet would, many at a time, until the input ends.
func prober() {
	var writing sync.Mutex
	output := json.NewEncoder(os.Stdout)
	input := bufio.NewScanner(os.Stdin)
	for input.Scan() {
		var asked question
		if err := json.Unmarshal(input.Bytes(), &asked); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		go func() {
			result, said, err := ask(asked)
			if err != nil {
				said = err.Error()
			}
			writing.Lock()
			defer writing.Unlock()
			_ = output.Encode(answer{asked.ID, err == nil && result != probe.Failure, said})
		}()
	}
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "kube etcd|kube-apiserver|kube-controller-manager|kube-scheduler|kubectl|prober FLAGS")
		os.Exit(2)
	}
	part := os.Args[1]
	os.Args = os.Args[1:]
	var command *cobra.Command
	switch part {
	case "etcd":
		etcdmain.Main(os.Args)
		return
	case "prober":
		prober()
		return
	case "kube-apiserver":
		command = apiserver.NewAPIServerCommand()
	case "kube-controller-manager":
		command = controllers.NewControllerManagerCommand()
	case "kube-scheduler":
		command = scheduler.NewSchedulerCommand()
	case "kubectl":
		command = kubectl.NewDefaultKubectlCommand()
	default:
		fmt.Fprintln(os.Stderr, "no such part:", part)
		os.Exit(2)
	}
	os.Exit(cli.Run(command))
}
